// Answers to prompts that were not trained on, before and after.

function heldOut(data) {
  const runs = data.runs.filter((run) => run.held_out);
  if (!runs.length) return null;
  return part(
    "held-out",
    "Held-out prompts",
    runs.map((run) => ofRun(run, runs.length > 1)),
  );
}

function ofRun(run, named) {
  const { before, after, pairs, total } = run.held_out;
  const gain = (row) => (row.after.score ?? NaN) - (row.before.score ?? NaN);
  const columns = [
    {
      name: "prompt",
      text: true,
      get: (row) => row.prompt.at(-1)?.content ?? "",
      show: (row) => written(row.prompt.at(-1)?.content ?? ""),
    },
    { name: before, text: true, get: (row) => row.before.text, show: (row) => answer(row.before) },
    { name: "score", get: (row) => row.before.score },
    { name: after, text: true, get: (row) => row.after.text, show: (row) => answer(row.after) },
    { name: "score ", get: (row) => row.after.score },
    { name: "gain", get: gain },
  ];
  const table = new SortedTable("Held-out prompts before and after", columns, pairs);
  const find = search("Find in prompts and answers", (text) =>
    table.filter((row) => JSON.stringify(row).toLowerCase().includes(text)),
  );
  const only =
    pairs.length < total
      ? make("span", { class: "hint" }, `${figure(pairs.length)} of ${figure(total)} prompts`)
      : null;
  return make(
    "div",
    {},
    named ? make("h3", {}, run.name) : null,
    figures(run, before, after),
    make("div", { class: "controls" }, find, only),
    table.root,
  );
}

function answer(one) {
  const end = one.finished === false ? make("span", { class: "hint" }, "cut off") : null;
  return make("div", {}, written(one.text), end);
}

/** The metrics of the first and the newest evaluation. */
function figures(run, before, after) {
  const names = Object.keys(run.curves)
    .filter((name) => name.startsWith("eval/") && !name.endsWith("_se"))
    .sort();
  const at = (name, end) => {
    const curve = run.curves[name];
    const error = run.curves[`${name}_se`];
    const i = end ? curve.y.length - 1 : 0;
    const known = error?.y[error.x.indexOf(curve.x[i])];
    return known === undefined || known === null
      ? figure(curve.y[i])
      : `${figure(curve.y[i])} ± ${figure(known)}`;
  };
  const several = names.some((name) => run.curves[name].x.length > 1);
  if (!several) return null;
  return make(
    "div",
    { class: "scroll" },
    make(
      "table",
      { class: "figures" },
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          make("th", { scope: "col" }, "metric, ± SE"),
          make("th", { scope: "col" }, before),
          make("th", { scope: "col" }, after),
        ),
      ),
      make(
        "tbody",
        {},
        names.map((name) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, name),
            make("td", {}, at(name, false)),
            make("td", {}, at(name, true)),
          ),
        ),
      ),
    ),
  );
}
