// One response: its prompt, its tokens, what the critic thought along it, and its group beside it.

const JUMPS = 3; // where the critic changed its mind most

/** The text of response number `i` of a step. */
function textOf(step, i) {
  return step.texts ? step.texts[i] : step.pieces[i].join("");
}

/** The mean of the numbers `name` over a response's own tokens; NaN where there are none. */
function meanOf(step, i, name) {
  const arrays = arraysOf(step);
  if (!arrays?.[name]) return NaN;
  return mean(
    arrays[name]
      .subarray(step.bounds[i], step.bounds[i + 1])
      .filter((_, k) => arrays.own[step.bounds[i] + k]),
  );
}

/** Tokens that the policy wrote of a response; null where they are not known. */
function lengthOf(step, i) {
  const arrays = arraysOf(step);
  return arrays
    ? arrays.own.subarray(step.bounds[i], step.bounds[i + 1]).reduce((sum, own) => sum + own, 0)
    : null;
}

function endOf(step, i) {
  return { true: "ended", false: "cut" }[step.finished[i]] ?? "–";
}

function promptView(turns) {
  return make(
    "div",
    { class: "prompt" },
    turns
      .map((turn) => [
        turn.role ? make("div", { class: "role" }, turn.role) : null,
        written(turn.content),
      ])
      .flat(),
  );
}

/** The view of response number `i`; `open(k)` shows another, `shade` is the name of a colouring
 * that stays from one to the next. */
function responseView(step, i, shade, open) {
  const facts = [
    ...Object.entries(step.scores).map(([name, values]) => `${name} ${figure(values[i])}`),
    step.kl ? `KL ${figure(step.kl[i])}` : null,
    step.bounds ? `${figure(lengthOf(step, i))} tokens` : null,
    endOf(step, i),
  ];
  const head = make("h3", { tabindex: -1 }, `Response ${i + 1} of step ${step.step}`);
  const root = make(
    "article",
    { class: "response", "aria-label": `Response ${i + 1}` },
    head,
    make("p", { class: "hint" }, facts.filter(Boolean).join(" · ")),
    promptView(step.prompts[i]),
  );
  if (!step.packed)
    root.append(make("div", { class: "role" }, "response"), written(textOf(step, i)));
  else root.append(...tokenViews(step, i, shade), groupView(step, i, open) ?? "");
  return root;
}

function tokenViews(step, i, shade) {
  let trace = null;
  const tokens = new Tokens(step, i, (at) => {
    if (!trace) return;
    trace.cursor = at + 1;
    trace.refresh();
  });
  const shades = shadesOf(step);
  const legend = make("span", { class: "hint" });
  const pick = (name) => {
    const found = shades.find((one) => one.name === name) ?? shades[0];
    const scale = found.scale();
    shade.name = found.name;
    legend.textContent = scale.told;
    tokens.color(scale.of);
  };
  const select = choice(
    "Colour by",
    shades.map((one) => [one.name, one.title]),
    pick,
  );
  select.querySelector("select").value = shades.some((one) => one.name === shade.name)
    ? shade.name
    : "none";
  pick(shade.name);
  const found = [make("div", { class: "controls" }, select, legend), tokens.root];
  trace = valueTrace(step, i, (at) => tokens.go(at));
  if (trace)
    found.push(
      make(
        "figure",
        { class: "trace" },
        make("figcaption", {}, "The critic along the response"),
        trace.root,
      ),
      jumps(step, i, tokens),
    );
  return found;
}

/** The critic's value, and what came of it, at each of the policy's tokens. */
function valueTrace(step, i, go) {
  const arrays = arraysOf(step);
  if (!arrays.values) return null;
  const [start, end] = [step.bounds[i], step.bounds[i + 1]];
  const places = [];
  for (let place = start; place < end; place += 1) if (arrays.own[place]) places.push(place);
  const line = (name, color, values) => ({
    name,
    color,
    x: places.map((place) => place - start + 1),
    y: places.map((place) => values[place]),
  });
  const series = [line("value", 0, arrays.values)];
  if (arrays.returns) series.push(line("return", 1, arrays.returns));
  return SIGHT.watch(
    new Plot(series, {
      label: "Value and return along the response",
      unit: "token",
      onPick: (x) => go(x - 1),
    }),
  );
}

/** Where the value changed most from one of the policy's tokens to the next. */
function jumps(step, i, tokens) {
  const arrays = arraysOf(step);
  const [start, end] = [step.bounds[i], step.bounds[i + 1]];
  const found = [];
  let before = null;
  for (let place = start; place < end; place += 1) {
    if (!arrays.own[place]) continue;
    if (before !== null)
      found.push([before, place, Math.abs(arrays.values[place] - arrays.values[before])]);
    before = place;
  }
  found.sort((a, b) => b[2] - a[2]);
  const items = found.slice(0, JUMPS).map(([from, to]) => {
    const piece = oneLine(visible(step.pieces[i][from - start]), 20) || "⏎";
    const [was, is] = [arrays.values[from], arrays.values[to]].map((value) => figure(value));
    const text = `after “${piece}” (token ${from - start + 1}): ${was} → ${is}`;
    return make(
      "li",
      {},
      button(text, () => tokens.go(to - start), { class: "open" }),
    );
  });
  return items.length
    ? make(
        "div",
        { class: "jumps" },
        "Where the critic changed its mind most:",
        make("ul", {}, items),
      )
    : "";
}

/** All responses to the same prompt, the best first; null where there is no other. */
function groupView(step, i, open) {
  const members = step.group
    .map((group, k) => [group, k])
    .filter(([group]) => group === step.group[i])
    .map(([, k]) => k);
  if (members.length < 2) return null;
  const [name] = Object.keys(step.scores);
  members.sort((a, b) => (step.scores[name][b] ?? -Infinity) - (step.scores[name][a] ?? -Infinity));
  const cards = members.map((k) => {
    const scores = Object.entries(step.scores)
      .map(([of, values]) => `${of} ${figure(values[k])}`)
      .join(" · ");
    const facts = [
      scores,
      `advantage ${figure(meanOf(step, k, "advantages"))}`,
      `${figure(lengthOf(step, k))} tokens`,
      endOf(step, k),
    ].join(" · ");
    return make(
      "li",
      { class: k === i ? "card current" : "card", "aria-current": k === i ? "true" : null },
      button(`Response ${k + 1}`, () => open(k), { class: "open" }),
      make("div", { class: "hint" }, facts),
      written(textOf(step, k)),
    );
  });
  return make(
    "section",
    { class: "group", "aria-label": "The group" },
    make("h4", {}, `The ${members.length} responses to this prompt`),
    make("ul", { class: "cards" }, cards),
  );
}
