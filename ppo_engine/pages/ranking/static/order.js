// The order into which cards are put, and the strip that shows it.

import { make } from "./cards.js";

// Groups of tied cards, best first; a card that is in none of them has no place.
export class Order {
  constructor(count, ranks = null) {
    this.count = count;
    this.groups = [];
    for (const [card, rank] of (ranks ?? []).entries()) {
      if (rank !== null) (this.groups[rank] ??= []).push(card);
    }
    this.groups = this.groups.filter(Boolean);
  }

  // The place of a card, from 0; -1 where it has none.
  place(card) {
    return this.groups.findIndex((group) => group.includes(card));
  }

  get missing() {
    return [...Array(this.count).keys()].filter((card) => this.place(card) < 0);
  }

  get ranks() {
    return [...Array(this.count).keys()].map((card) => {
      const place = this.place(card);
      return place < 0 ? null : place;
    });
  }

  remove(card) {
    this.groups = this.groups
      .map((group) => group.filter((other) => other !== card))
      .filter((group) => group.length);
  }

  // As the last, alone or `tied` with the last so far.
  append(card, tied) {
    if (tied && this.groups.length) this.groups.at(-1).push(card);
    else this.groups.push([card]);
  }

  // Between others, before the group that begins with the card `next`; null: as the last.
  insert(card, next) {
    if (card === next) return;
    this.remove(card);
    const at = next === null ? this.groups.length : this.place(next);
    this.groups.splice(at, 0, [card]);
  }

  tie(card, other) {
    if (card === other) return;
    this.remove(card);
    this.groups[this.place(other)].push(card);
  }
}

// Fills the strip `list` with the order's groups, which cards may be dropped between or onto.
// `changed` is called after a drop, `taken` with a card whose button was pressed.
export function showOrder(list, order, changed, taken) {
  const parts = [];
  for (const group of order.groups) {
    parts.push(gap(group, ">", order, changed));
    const place = make("li", { className: "place" });
    for (const [index, card] of group.entries()) {
      if (index) place.append("=");
      const chip = make("button", {
        type: "button",
        draggable: true,
        textContent: String(card + 1),
        ariaLabel: `Take response ${card + 1} out again`,
      });
      chip.addEventListener("click", () => taken(card));
      draggable(chip, card);
      place.append(chip);
    }
    droppable(place, order.count, (card) => {
      order.tie(card, group.find((other) => other !== card) ?? card);
      changed();
    });
    parts.push(place);
  }
  parts.push(gap(null, "", order, changed));
  list.replaceChildren(...parts);
}

export function draggable(element, card) {
  element.addEventListener("dragstart", (event) => {
    event.stopPropagation();
    event.dataTransfer.setData("text/plain", String(card));
    event.dataTransfer.effectAllowed = "move";
  });
}

function gap(before, sign, order, changed) {
  const between = order.groups.length && before !== order.groups[0];
  const element = make("li", { className: "gap", textContent: between ? sign : "" });
  element.ariaHidden = "true";
  droppable(element, order.count, (card) => {
    const next = before?.find((other) => other !== card);
    if (before && next === undefined) return; // it is there already
    order.insert(card, next ?? null);
    changed();
  });
  return element;
}

function droppable(element, count, drop) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    const card = Number(event.dataTransfer.getData("text/plain") || NaN);
    if (Number.isInteger(card) && card >= 0 && card < count) drop(card);
  });
}
