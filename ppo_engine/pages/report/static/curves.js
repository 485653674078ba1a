// The curves of all metrics, of all runs over each other, in sections.

const LARGE = 3; // decades that positive numbers span, from which an axis is logarithmic
const CLOSED = new Set([
  "Speed",
  "Time, seconds",
  "Use of the machine",
  "Time outside the models",
  "Padding",
  "Memory, GiB",
]);

class Curves {
  constructor(data) {
    this.data = data;
    this.plots = [];
    this.domain = null;
    this.smooth = 0;
    this.folds = data.sections.map((section) => this.fold(section));
    this.root = part(
      "curves",
      "Curves",
      this.controls(),
      this.folds.map((fold) => fold.root),
    );
  }

  controls() {
    const weight = make("output", {}, "off");
    const slider = make("input", {
      type: "range",
      min: 0,
      max: 0.98,
      step: 0.02,
      value: 0,
      on: {
        input: () => {
          this.smooth = Number(slider.value);
          weight.textContent = this.smooth ? figure(this.smooth) : "off";
          this.each((plot) => {
            plot.options.smooth = this.smooth;
          });
        },
      },
    });
    return make(
      "div",
      { class: "controls" },
      search("Find a metric", (text) => this.find(text)),
      labelled("Smoothing", slider, weight),
      button("All steps", () => this.zoom(null), { title: "as a double click on a curve" }),
      make(
        "span",
        { class: "hint" },
        "Drag over a curve to zoom into all; double click for all steps; " +
          "arrow keys walk along a curve.",
      ),
    );
  }

  fold(section) {
    const boxes = section.metrics.map((name) => this.box(name));
    const grid = make(
      "div",
      { class: "grid" },
      boxes.map((box) => box.root),
    );
    const open = !CLOSED.has(section.title);
    const root = make("details", { class: "fold", open }, make("summary", {}, section.title), grid);
    return { root, boxes, open };
  }

  box(name) {
    const panel = this.data.panels[name] ?? { title: name, unit: "" };
    const series = this.data.runs.flatMap((run, number) => {
      const curve = run.curves[name];
      if (!curve) return [];
      return [
        { name: run.name, color: number, ...curve, band: bandOf(run.curves[panel.band], curve) },
      ];
    });
    const log = wantsLog(series);
    const level = panel.level ?? undefined;
    const plot = new Plot(series, {
      label: `${panel.title}, ${name}`,
      percent: panel.percent ?? false,
      level,
      log,
      onZoom: (domain) => this.zoom(domain),
    });
    this.plots.push(SIGHT.watch(plot));
    const unit = [panel.title === name ? "" : name, panel.unit].filter(Boolean).join(", ");
    const toggle = button(
      "log",
      () => {
        plot.options.log = !plot.options.log;
        toggle.setAttribute("aria-pressed", plot.options.log);
        plot.refresh();
      },
      { class: "small", "aria-pressed": log, "aria-label": `logarithmic axis of ${name}` },
    );
    const positive = series.some((one) => one.y.some((value) => value > 0));
    const title = make(
      "figcaption",
      {},
      make("b", {}, panel.title),
      positive ? toggle : null,
      make("span", { class: "hint unit", title: unit }, unit),
    );
    const root = make("figure", { class: "curve" }, title, plot.root);
    return { root, text: `${name} ${panel.title}`.toLowerCase() };
  }

  find(text) {
    for (const fold of this.folds) {
      const hits = fold.boxes.filter(
        (box) => (box.root.hidden = !box.text.includes(text)) === false,
      );
      fold.root.hidden = hits.length === 0;
      fold.root.open = text ? true : fold.open;
    }
  }

  zoom(domain) {
    this.each((plot) => {
      plot.options.domain = domain;
    });
  }

  /** Show or hide a run. */
  show(number, shown) {
    this.each((plot) => {
      for (const one of plot.series) if (one.color === number) one.hidden = !shown;
    });
  }

  each(change) {
    for (const plot of this.plots) {
      change(plot);
      plot.refresh();
    }
  }
}

/** Half the width of the band at each point of `curve`, where the band has a number. */
function bandOf(band, curve) {
  if (!band) return null;
  const at = new Map(band.x.map((x, i) => [x, band.y[i]]));
  return curve.x.map((x) => at.get(x) ?? null);
}

/** Whether all numbers are above 0, and of very different sizes. */
function wantsLog(series) {
  let [low, high] = [Infinity, 0];
  for (const one of series) {
    for (const value of one.y) {
      if (value === null) continue;
      if (value <= 0) return false;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return high > 0 && Math.log10(high / low) >= LARGE;
}
