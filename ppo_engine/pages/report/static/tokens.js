// A response token by token: coloured by a number, which is shown under the pointer and the keys.

const NUMBERS = {
  logprobs: "log-prob",
  ref_logprobs: "log-prob of the reference",
  kl: "KL to the reference",
  advantages: "advantage",
  values: "value",
  returns: "return",
  ratio: "ratio after / before",
};
const BLUE = "42, 111, 187";
const ORANGE = "209, 96, 43";
const STRONGEST = 0.6; // opacity, through which a token can still be read

/** The arrays of a recorded step, unpacked once. */
function arraysOf(step) {
  if (!step.packed) return null;
  if (!step.arrays) {
    const kinds = { tokens: Int32Array, own: Uint8Array, special: Uint8Array, clipped: Uint8Array };
    step.arrays = {};
    for (const [name, text] of Object.entries(step.packed)) {
      step.arrays[name] = unpacked(text, kinds[name] ?? Float32Array);
    }
    const { logprobs, ref_logprobs: reference } = step.arrays;
    if (logprobs && reference) step.arrays.kl = logprobs.map((value, i) => value - reference[i]);
  }
  return step.arrays;
}

/** How tokens can be coloured: by a name, with a title, what `scale()` is in words and of a token's
 * place its [colour, opacity]. The scale is the step's, so that responses compare. */
function shadesOf(step) {
  const arrays = arraysOf(step);
  const own = (values) => values.filter((_, i) => arrays.own[i]);
  /** Two colours, for numbers above and below a middle. */
  const both = (name, title, told, values, middle = () => 0) => ({
    name,
    title,
    scale() {
      const center = middle();
      const far =
        quantile(
          own(values()).map((value) => Math.abs(value - center)),
          0.98,
        ) || 1;
      const of = (i) => {
        const share = Math.max(-1, Math.min(1, (values()[i] - center) / far));
        return [share > 0 ? BLUE : ORANGE, STRONGEST * Math.abs(share)];
      };
      return { of, told: `${told}; full colour ${figure(far)} from ${figure(center)}` };
    },
  });
  const all = {
    logprobs: {
      name: "logprobs",
      title: "log-prob",
      scale() {
        const far = -quantile(own(arrays.logprobs), 0.02) || 1;
        const of = (i) => [ORANGE, STRONGEST * Math.min(1, -arrays.logprobs[i] / far)];
        return { of, told: `the stronger, the less likely; full colour at ${figure(-far)} nats` };
      },
    },
    kl: both("kl", "KL", "blue: likelier than to the reference, orange: less", () => arrays.kl),
    advantages: both(
      "advantages",
      "advantage",
      "blue: better than expected, orange: worse",
      () => arrays.advantages,
    ),
    values: both(
      "values",
      "value",
      "blue: above the step's mean value, orange: below",
      () => arrays.values,
      () => mean(own(arrays.values)),
    ),
    ratio: both(
      "ratio",
      "ratio",
      "blue: likelier after the update, orange: less, in logarithms",
      () => (arrays.logRatio ??= arrays.ratio.map(Math.log)),
    ),
    clipped: {
      name: "clipped",
      title: "clipped",
      scale: () => ({
        of: (i) => (arrays.clipped[i] ? [ORANGE, STRONGEST] : null),
        told: "orange: the clip range holds its ratio",
      }),
    },
  };
  const none = { name: "none", title: "none", scale: () => ({ of: () => null, told: "" }) };
  return [none, ...Object.values(all).filter((shade) => arrays[shade.name])];
}

class Tokens {
  /** Those of response number `index` of a `step`; `told(i)` hears which one is looked at. */
  constructor(step, index, told = () => {}) {
    Object.assign(this, { step, index, told });
    this.arrays = arraysOf(step);
    [this.start, this.end] = [step.bounds[index], step.bounds[index + 1]];
    this.spans = step.pieces[index].map((piece, i) => this.span(piece, i));
    this.panel = make("dl", { class: "numbers", "aria-live": "polite" });
    this.box = make(
      "div",
      {
        class: "tokens",
        dir: "auto",
        role: "listbox",
        "aria-label": "Tokens of the response: arrow keys move, numbers are beside it",
        on: {
          pointerover: (event) => this.look(this.number(event.target)),
          focusin: (event) => this.look(this.number(event.target)),
          keydown: (event) => this.key(event),
        },
      },
      this.turns(),
    );
    this.root = make("div", { class: "token-view" }, this.box, this.panel);
    if (this.spans.length) this.look(0);
  }

  span(piece, i) {
    const place = this.start + i;
    const kinds = ["token"];
    if (this.arrays.special[place]) kinds.push("special");
    return make(
      "span",
      { class: kinds.join(" "), role: "option", "data-i": i, tabindex: i === 0 ? 0 : -1 },
      shownPiece(piece),
    );
  }

  /** The tokens, those that an environment wrote in boxes of their own. */
  turns() {
    const found = [];
    let box = null;
    this.spans.forEach((span, i) => {
      if (this.arrays.own[this.start + i]) {
        box = null;
        found.push(span);
        return;
      }
      if (!box) {
        box = make("div", {
          class: "environment",
          role: "group",
          "aria-label": "written by the environment",
        });
        found.push(box);
      }
      box.append(span);
    });
    return found;
  }

  /** Colour each token as `of` says of its place. */
  color(of) {
    this.spans.forEach((span, i) => {
      const place = this.start + i;
      const found = this.arrays.own[place] ? of(place) : null;
      span.style.backgroundColor =
        found && Number.isFinite(found[1]) ? `rgba(${found[0]}, ${found[1].toFixed(3)})` : "";
    });
  }

  number(element) {
    const span = element.closest?.(".token");
    return span ? Number(span.dataset.i) : null;
  }

  /** Show the numbers of a token. */
  look(i) {
    if (i === null || i === this.at) return;
    this.spans[this.at]?.classList.remove("at");
    this.spans[this.at]?.setAttribute("aria-selected", "false");
    this.at = i;
    this.spans[i].classList.add("at");
    this.spans[i].setAttribute("aria-selected", "true");
    const place = this.start + i;
    const own = this.arrays.own[place];
    const facts = [
      ["token", JSON.stringify(this.step.pieces[this.index][i])],
      ["id", String(this.arrays.tokens[place])],
      ["number", `${i + 1} of ${this.spans.length}`],
    ];
    if (own) {
      for (const [name, title] of Object.entries(NUMBERS)) {
        const values = this.arrays[name];
        if (values) facts.push([title, figure(values[place])]);
      }
      if (this.arrays.logprobs)
        facts.push(["probability", figure(Math.exp(this.arrays.logprobs[place]), true)]);
      if (this.arrays.clipped) facts.push(["clipped", this.arrays.clipped[place] ? "yes" : "no"]);
    } else facts.push(["written by", "the environment"]);
    this.panel.replaceChildren(
      ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, visible(value))]),
    );
    this.told(i);
  }

  /** Look at a token, and go there with the keys. */
  go(i) {
    const next = Math.min(Math.max(i, 0), this.spans.length - 1);
    for (const span of this.spans) span.tabIndex = -1;
    this.spans[next].tabIndex = 0;
    this.spans[next].focus();
  }

  key(event) {
    const to = {
      ArrowRight: this.at + 1,
      ArrowLeft: this.at - 1,
      ArrowDown: this.at + 10,
      ArrowUp: this.at - 10,
      Home: 0,
      End: this.spans.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.go(to);
  }
}

/** A token's text, with signs for what cannot be seen. */
function shownPiece(piece) {
  if (piece === "") return "∅";
  return visible(piece).replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}
