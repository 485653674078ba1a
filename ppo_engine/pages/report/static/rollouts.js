// What the policy wrote in the steps that were recorded: a table, and a response at a time.

class Rollouts {
  constructor(data) {
    this.runs = data.runs.filter((run) => run.rollouts.steps.length);
    this.shade = { name: "advantages" };
    this.place = make("div");
    this.detail = make("div", { class: "detail" });
    this.head = make("div", { class: "controls" });
    this.root = part("rollouts", "Rollouts", this.head, this.place, this.detail);
    if (this.runs.length) this.pickRun(0);
    else
      this.place.append(
        make(
          "p",
          { class: "hint" },
          "No rollouts were recorded: run.record_rollouts=N records every N-th step, " +
            "and run.sample_every=N some responses.",
        ),
      );
  }

  pickRun(number) {
    this.run = this.runs[number];
    const { steps, left_out: leftOut } = this.run.rollouts;
    const runs =
      this.runs.length > 1
        ? choice(
            "Run",
            this.runs.map((run, i) => [i, run.name]),
            (i) => this.pickRun(Number(i)),
          )
        : null;
    if (runs) runs.querySelector("select").value = number;
    const pick = choice(
      "Step",
      steps.map((step, i) => [i, step.step]),
      (i) => this.pickStep(steps[i]),
    );
    pick.querySelector("select").value = steps.length - 1;
    const only = leftOut
      ? make(
          "span",
          { class: "hint" },
          `the first and the newest; ${figure(leftOut)} recorded steps between are not on the page`,
        )
      : null;
    this.head.replaceChildren(...[runs, pick, only].filter(Boolean));
    this.pickStep(steps[steps.length - 1]);
  }

  pickStep(step) {
    this.step = step;
    const count = step.prompts.length;
    const rows = Array.from({ length: count }, (_, i) => ({
      i,
      text: textOf(step, i),
      prompt: step.prompts[i].at(-1)?.content ?? "",
      end: endOf(step, i),
    }));
    this.table = new SortedTable("Responses", this.columns(step), rows, (row) => this.open(row.i));
    let [text, end] = ["", ""];
    const filter = () =>
      this.table.filter(
        (row) =>
          (!end || row.end === end) &&
          (!text || `${row.prompt}\n${row.text}`.toLowerCase().includes(text)),
      );
    const controls = make(
      "div",
      { class: "controls" },
      search("Find in prompts and responses", (value) => {
        text = value;
        filter();
      }),
      choice(
        "Show",
        [
          ["", "all"],
          ["ended", "ended"],
          ["cut", "cut off"],
        ],
        (value) => {
          end = value;
          filter();
        },
      ),
      count < step.total
        ? make(
            "span",
            { class: "hint" },
            `the first ${figure(count)} of ${figure(step.total)} responses`,
          )
        : null,
    );
    this.place.replaceChildren(controls, this.table.root);
    this.show(0);
  }

  columns(step) {
    const found = [{ name: "#", get: (row) => row.i + 1 }];
    if (step.group && new Set(step.group).size < step.group.length)
      found.push({ name: "group", get: (row) => step.group[row.i] });
    found.push(
      {
        name: "prompt",
        text: true,
        get: (row) => row.prompt,
        show: (row) => oneLine(visible(row.prompt), 60),
      },
      {
        name: "response",
        text: true,
        get: (row) => row.text,
        show: (row) => oneLine(visible(row.text), 110),
      },
    );
    for (const [name, values] of Object.entries(step.scores))
      found.push({ name, get: (row) => values[row.i] });
    if (step.packed) {
      found.push({ name: "length", get: (row) => lengthOf(step, row.i) });
      if (step.kl) found.push({ name: "KL", get: (row) => step.kl[row.i] });
      if (step.packed.advantages)
        found.push({ name: "advantage", get: (row) => meanOf(step, row.i, "advantages") });
    }
    found.push({ name: "end", text: true, get: (row) => row.end, show: (row) => row.end });
    return found;
  }

  /** Show a response, and go to it. */
  open(i) {
    this.show(i);
    const head = this.detail.querySelector("h3");
    head.focus({ preventScroll: true });
    this.detail.scrollIntoView({ block: "nearest" });
  }

  show(i) {
    const order = this.table.sorted.map((row) => row.i);
    const at = order.indexOf(i);
    const beside = (by, text) => {
      const next = order[at + by];
      return button(text, () => this.open(next), { disabled: at < 0 || next === undefined });
    };
    for (const plot of [...SIGHT.plots.values()])
      if (this.detail.contains(plot.canvas)) SIGHT.forget(plot);
    this.detail.replaceChildren(
      make("div", { class: "controls" }, beside(-1, "← previous"), beside(1, "next →")),
      responseView(this.step, i, this.shade, (k) => this.open(k)),
    );
  }
}
