// The page on which a person ranks: what is asked of the server, keys, clicks.

import { card, make, prompt, written } from "./cards.js";
import { draggable, Order, showOrder } from "./order.js";

const by = (id) => document.getElementById(id);
const state = {
  annotator: "",
  task: null,
  order: new Order(0),
  tied: false, // the next card joins the last one
  asked: false, // whether cards without a place were asked for
  busy: false,
  seconds: 0, // that this task was looked at, up to `since`
  since: 0,
};

// The server

async function ask(path, body = null) {
  const query = body ? "" : `?${new URLSearchParams({ annotator: state.annotator })}`;
  const [name, more] = path.split("?");
  const url = `${name}${query}${more ? `&${more}` : ""}`;
  const sent = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ annotator: state.annotator, ...body }),
  };
  let answer, text;
  try {
    answer = await fetch(url, sent ?? {});
    text = await answer.text(); // may break off after the head of an answer
  } catch {
    throw new Error(
      "The server does not answer, so nothing is saved from now on. Start the same `ppo-engine " +
        "rank` again and open the address that it prints: what was saved is there.",
    );
  }
  if (answer.ok) return JSON.parse(text);
  throw new Error(mistake(text) ?? `The server refused: ${answer.status}.`);
}

// What the server says is wrong; undefined where it says so in no JSON.
function mistake(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    return undefined;
  }
}

// Runs one thing at a time; what goes wrong is told, and what is on the page stays.
async function alone(run) {
  if (state.busy) return;
  state.busy = true;
  document.body.ariaBusy = "true";
  try {
    await run();
  } catch (error) {
    tell(error.message);
  } finally {
    state.busy = false;
    document.body.ariaBusy = "false";
  }
}

function decide(ranks, mark = "") {
  const { place, shown } = state.task;
  const seconds = looked();
  return alone(async () => show(await ask("decision", { place, shown, ranks, mark, seconds })));
}

const undo = () => alone(async () => show(await ask("undo", { undo: true })));
const go = (place) => place !== null && alone(async () => show(await ask(`task?place=${place}`)));

// What is shown

function show(task) {
  state.task = task;
  tell("");
  showProgress(task);
  const ended = task.place === undefined;
  by("tools").hidden = false;
  by("work").hidden = ended;
  by("actions").hidden = ended;
  by("end").hidden = !ended;
  by("previous").disabled = task.previous === null;
  by("following").disabled = task.following === null;
  by("undo").disabled = !task.done;
  if (ended) {
    by("end-agreement").textContent = task.agreement;
    by("end").focus();
    return;
  }
  const pair = task.cards.length === 2;
  by("prompt").replaceChildren(...prompt(task.prompt, task.tools));
  by("places-section").hidden = pair;
  state.order = new Order(task.cards.length, task.decision?.mark ? null : task.decision?.ranks);
  by("cards").replaceChildren(
    ...task.cards.map((response, index) => {
      const element = card(response, index + 1, (event) => {
        if (pair && event.detail > 1) return;
        choose(index);
        // After a click Enter is to save, not to press the same button again.
        if (event.detail) by("work").focus({ preventScroll: true });
      });
      draggable(element, index);
      return element;
    }),
  );
  by("actions").replaceChildren(...(pair ? pairActions() : actions()));
  restart();
  state.seconds = 0;
  state.since = performance.now();
  window.scrollTo(0, 0);
  by("work").focus({ preventScroll: true });
  const before = { all_bad: "all bad", skipped: "skipped" }[task.decision?.mark];
  if (before) tell(`You had marked this prompt: ${before}.`);
}

function showProgress({ done, total, secondsLeft }) {
  const left = done < total && secondsLeft !== null ? `, about ${duration(secondsLeft)} left` : "";
  by("progress").textContent = `${done} of ${total} done${left}`;
  by("bar").max = Math.max(1, total);
  by("bar").value = done;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function actions() {
  return [
    action("save", "Save", "Enter", save, "main"),
    action("tie", "Tie the next with the last", "t", tie),
    action("clear", "Clear", "c", clear),
    action("bad", "All bad", "b", () => decide([], "all_bad")),
    action("skip", "Skip", "s", () => decide([], "skipped")),
  ];
}

function pairActions() {
  return [
    action("left", "Left is better", "←", () => decide([0, 1]), "main"),
    action("tie", "Tie", "t", () => decide([0, 0])),
    action("right", "Right is better", "→", () => decide([1, 0]), "main"),
    action("bad", "All bad", "b", () => decide([], "all_bad")),
    action("skip", "Skip", "s", () => decide([], "skipped")),
  ];
}

function action(id, label, key, run, className = "") {
  const button = make("button", { id, type: "button", className }, label, " ");
  button.append(make("kbd", { textContent: key }));
  button.addEventListener("click", once(run));
  return button;
}

// A double click decides once: its second half would fall on the prompt that comes next.
function once(run) {
  return (event) => event.detail > 1 || run();
}

function render() {
  const { order, tied, task } = state;
  const pair = task.cards.length === 2;
  for (const [index, element] of [...by("cards").children].entries()) {
    const place = order.place(index);
    element.classList.toggle("placed", place >= 0);
    const others = place < 0 ? 0 : order.groups[place].length - 1;
    const told = place < 0 ? "" : `place ${place + 1}${others ? ", tied" : ""}`;
    element.querySelector(".rank").textContent = told;
    const free = pair ? "This is better" : "Next best";
    const button = element.querySelector(".choose");
    button.textContent = place < 0 || pair ? `${free} ` : "Take out ";
    button.append(make("kbd", { textContent: String(index + 1) }));
  }
  if (pair) return;
  const within = by("places").contains(document.activeElement);
  showOrder(by("places"), order, restart, choose);
  if (within) by("work").focus({ preventScroll: true });
  by("tie").ariaPressed = String(tied);
  by("tie").disabled = !order.groups.length;
}

function tell(text) {
  by("message").textContent = text;
}

// What a person does

function choose(index) {
  const { order, task } = state;
  if (index >= task.cards.length) return;
  if (task.cards.length === 2) {
    decide(index ? [1, 0] : [0, 1]);
    return;
  }
  if (order.place(index) >= 0) order.remove(index);
  else order.append(index, state.tied);
  restart();
  const place = order.place(index);
  const where = place < 0 ? "no place" : `place ${place + 1}`;
  by("spoken").textContent = `Response ${index + 1}: ${where}`;
}

// After every change of the order.
function restart() {
  state.tied = false;
  state.asked = false;
  tell("");
  render();
}

function tie() {
  if (!state.order.groups.length) return;
  state.tied = !state.tied;
  render();
  const last = state.order.groups.at(-1).map((index) => index + 1);
  tell(state.tied ? `The next one is tied with ${last.join(" and ")}.` : "");
}

function clear() {
  state.order = new Order(state.task.cards.length);
  restart();
}

function save() {
  const { order } = state;
  const missing = order.missing.map((index) => index + 1);
  if (order.count - missing.length < 2) {
    tell("Give two responses a place at least; or mark all as bad (b), or skip the prompt (s).");
  } else if (missing.length && !state.asked) {
    state.asked = true;
    const which =
      missing.length > 1 ? `Responses ${missing.join(", ")} have` : `Response ${missing} has`;
    tell(`${which} no place yet. Save once more to leave it so: not ranked.`);
  } else {
    decide(order.ranks);
  }
}

async function openEarlier() {
  await alone(async () => {
    const found = await ask("earlier");
    const names = { all_bad: " (all bad)", skipped: " (skipped)" };
    const items = found.map(({ place, text, mark }) => {
      const words = make("bdi", { textContent: text });
      const button = make("button", { type: "button" }, words, names[mark] ?? "");
      button.addEventListener("click", () => {
        by("earlier").close();
        go(place);
      });
      return make("li", {}, button);
    });
    by("earlier-list").replaceChildren(...items);
    by("earlier").showModal();
  });
}

async function openAgreement() {
  await alone(async () => {
    by("agreement-text").textContent = await ask("agreement");
    by("agreement").showModal();
  });
}

// Keys: of everywhere, of many responses, of two
const EVERYWHERE = {
  u: undo,
  p: () => go(state.task.previous),
  n: () => go(state.task.following),
  e: openEarlier,
  a: openAgreement,
  "?": () => by("keys").showModal(),
};
const DECIDING = { b: () => decide([], "all_bad"), s: () => decide([], "skipped") };
const MANY = { ...DECIDING, Enter: save, t: tie, "=": tie, c: clear, Escape: clear };
const PAIR = {
  ...DECIDING,
  ArrowLeft: () => decide([0, 1]),
  ArrowRight: () => decide([1, 0]),
  t: () => decide([0, 0]),
  "=": () => decide([0, 0]),
  0: () => decide([0, 0]),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  const typing = target.closest("input, dialog");
  const pressing = target.closest("button, summary") && (key === "Enter" || key === " ");
  if (!state.task || typing || pressing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.repeat) return; // a key that is held decides once
  // Which selects, or scrolls wide code.
  const code = target.closest("pre");
  const within = event.shiftKey || (code && code.scrollWidth > code.clientWidth);
  if (key.startsWith("Arrow") && within) return;
  const ended = state.task.place === undefined;
  const keys = ended ? {} : state.task.cards.length === 2 ? PAIR : MANY;
  const number = /^[1-9]$/.test(key) ? Number(key) : 0;
  const run = Object.hasOwn(keys, key)
    ? keys[key]
    : Object.hasOwn(EVERYWHERE, key)
      ? EVERYWHERE[key]
      : number && !ended
        ? () => choose(number - 1)
        : null;
  if (!run) return;
  event.preventDefault();
  run();
});

// The time that the page was looked at
function looked() {
  const now = document.hidden ? 0 : performance.now() - state.since;
  return (state.seconds + now) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) state.seconds += performance.now() - state.since;
  else state.since = performance.now();
});

by("undo").addEventListener("click", once(undo));
by("previous").addEventListener("click", once(() => go(state.task.previous)));
by("following").addEventListener("click", once(() => go(state.task.following)));
by("earlier-open").addEventListener("click", openEarlier);
by("agreement-open").addEventListener("click", openAgreement);
by("keys-open").addEventListener("click", () => by("keys").showModal());

async function begin(annotator) {
  state.annotator = annotator;
  const task = await ask("task");
  sessionStorage.setItem("annotator", annotator); // for when the page is loaded again
  by("who").hidden = true;
  show(task);
}

by("who").addEventListener("submit", (event) => {
  event.preventDefault();
  alone(() => begin(by("name").value));
});

by("actions").hidden = true;
alone(async () => {
  const session = await ask("session");
  if (session.guidelines) {
    by("guidelines-text").append(written({ text: session.guidelines }));
    by("guidelines").hidden = false;
  }
  by("people").append(...session.people.map((value) => make("option", { value })));
  const known = session.annotator || sessionStorage.getItem("annotator");
  if (known) {
    await begin(known);
  } else {
    by("who").hidden = false;
    by("name").focus();
  }
});
