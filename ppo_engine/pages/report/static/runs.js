// Which runs these are, in what they differ, and what looks wrong in them.

/** The colour of a run, beside its name. */
function swatch(number) {
  return make("span", { class: `swatch series-${number % 6}`, "aria-hidden": "true" });
}

/** The runs, each with a box that shows or hides its curves where there are several. */
function legend(data, show) {
  const rows = data.runs.map((run, number) => {
    const box = make("input", {
      type: "checkbox",
      checked: true,
      "aria-label": `show ${run.name}`,
      on: { change: () => show(number, box.checked) },
    });
    const steps =
      run.steps === null
        ? `step ${figure(run.step)}`
        : `step ${figure(run.step)} of ${figure(run.steps)}`;
    return make(
      "li",
      {},
      data.runs.length > 1 ? box : null,
      swatch(number),
      make("b", {}, run.name),
      make(
        "span",
        { class: "hint" },
        [
          run.method,
          steps,
          run.written && `last metrics ${run.written}`,
          run.thinned && `curves thinned to ${figure(run.thinned)} points with their peaks`,
        ]
          .filter(Boolean)
          .join(" · "),
      ),
    );
  });
  return make("ul", { class: "runs", "aria-label": "Runs" }, rows);
}

/** What looks wrong, and what could not be read. */
function notes(data) {
  const found = data.runs.flatMap((run, number) => {
    const who = data.runs.length > 1 ? [swatch(number), make("b", {}, run.name), " "] : [];
    const signs = run.notes.map((note) => {
      const now = note.lasts ? ", the newest too" : ", not the newest";
      return make(
        "li",
        {},
        who.map((node) => (typeof node === "string" ? node : node.cloneNode(true))),
        make("b", {}, sentence(note.what)),
        ` ${note.advice} `,
        make(
          "span",
          { class: "hint" },
          `${note.when}; in ${note.shown} of ${note.of} steps${now}.`,
        ),
      );
    });
    return [...signs, ...run.problems.map((text) => make("li", {}, who, text))];
  });
  const none = make(
    "p",
    { class: "hint" },
    "Nothing that is looked for: docs/failures.md has what may go wrong all the same, " +
      "and samples tell more than curves.",
  );
  return part("notes", "Notes", found.length ? make("ul", { class: "notes" }, found) : none);
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

/** Settings: of several runs those that differ first. */
function settings(data) {
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, key) => (key in run.settings ? JSON.stringify(run.settings[key]) : "–");
  const differ = (key) => new Set(data.runs.map((run) => value(run, key))).size > 1;
  const table = (chosen) =>
    make(
      "table",
      { class: "settings" },
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          make("th", { scope: "col" }, "setting"),
          data.runs.map((run) =>
            make("th", { scope: "col" }, data.runs.length > 1 ? run.name : "value"),
          ),
        ),
      ),
      make(
        "tbody",
        {},
        chosen.map((key) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, key),
            data.runs.map((run) => make("td", {}, value(run, key))),
          ),
        ),
      ),
    );
  const changed = keys.filter(differ);
  const several =
    data.runs.length > 1
      ? [changed.length ? table(changed) : make("p", {}, "The runs have the same settings.")]
      : [];
  return part(
    "settings",
    data.runs.length > 1 ? "Settings that differ" : "Settings",
    several,
    make(
      "details",
      { class: "fold" },
      make("summary", {}, `All ${keys.length} settings`),
      table(keys),
    ),
  );
}
