// A plot on a canvas: zoom by dragging, a double click resets, the numbers under the pointer or the
// arrow keys.

const MARGIN = { left: 54, right: 10, top: 8, bottom: 22 };

/** The colours of the page as it is now, light or dark. */
const COLORS = {
  read() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["text", "soft", "grid", "surface"]) {
      this[name] = style.getPropertyValue(`--${name}`).trim();
    }
    this.series = [0, 1, 2, 3, 4, 5].map((i) => style.getPropertyValue(`--series-${i}`).trim());
  },
  of(number) {
    return this.series[number % this.series.length];
  },
};

class Plot {
  /**
   * `series` are {name, color (a number), x, y, band (like y), hidden}. `options`: label; percent;
   * level, a dotted line; log; smooth; domain, the steps that are shown, or null; unit, what x
   * counts; onZoom(domain), onPick(x).
   */
  constructor(series, options) {
    this.series = series;
    this.options = { unit: "step", smooth: 0, domain: null, ...options };
    this.cursor = null; // the x that numbers are shown of
    this.drag = null; // pixels between which somebody drags
    this.seen = false;
    this.canvas = make("canvas", { tabindex: 0, role: "img", "aria-label": this.options.label });
    this.readout = make("output", { class: "readout", "aria-live": "polite" });
    this.root = make("div", { class: "plot" }, this.canvas, this.readout);
    this.listen();
  }

  /** Draw soon, or when it comes into sight. */
  refresh() {
    this.stale = true;
    if (!this.seen || this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  get shown() {
    return this.series.filter((one) => !one.hidden);
  }

  draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    this.stale = false;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    this.measure(width, height);
    this.describe();
    if (!this.y) return;
    this.drawGrid(context, width, height);
    context.save();
    context.beginPath();
    context.rect(MARGIN.left, 0, width - MARGIN.left - MARGIN.right, height - MARGIN.bottom + 2);
    context.clip();
    for (const one of this.shown) this.drawBand(context, one);
    for (const one of this.shown) this.drawSeries(context, one);
    context.restore();
    this.drawPointer(context, height);
  }

  /** The axes, of what is in sight. */
  measure(width, height) {
    const [from, to] = this.options.domain ?? this.extent();
    this.x = new Axis(from, to, MARGIN.left, width - MARGIN.left - MARGIN.right);
    let [low, high] = [Infinity, -Infinity];
    const see = (value) => {
      if (value === null || !Number.isFinite(value) || (this.options.log && value <= 0)) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    };
    for (const one of this.shown) {
      const inside = this.inside(one);
      for (let i = inside.start; i < inside.end; i += 1) {
        see(one.y[i]);
        const half = one.band?.[i] ?? null;
        if (half !== null && one.y[i] !== null) [one.y[i] - half, one.y[i] + half].forEach(see);
      }
    }
    if (low <= high && this.options.level !== undefined && !this.options.log) {
      see(this.options.level);
    }
    const room = this.options.log ? 0 : 0.05 * (high - low);
    const length = height - MARGIN.top - MARGIN.bottom;
    this.y =
      low <= high
        ? new Axis(low - room, high + room, height - MARGIN.bottom, -length, this.options.log)
        : null;
  }

  extent() {
    const ends = this.shown.filter((one) => one.x.length);
    if (!ends.length) return [0, 1];
    return [
      Math.min(...ends.map((one) => one.x[0])),
      Math.max(...ends.map((one) => one.x[one.x.length - 1])),
    ];
  }

  /** The points in sight, and one beyond on each side, towards which lines lead. */
  inside(one) {
    const start = Math.max(0, lowerBound(one.x, this.x.low) - 1);
    return { start, end: Math.min(one.x.length, lowerBound(one.x, this.x.high) + 2) };
  }

  drawGrid(context, width, height) {
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = COLORS.soft;
    context.strokeStyle = COLORS.grid;
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const tick of this.y.ticks(4)) {
      const y = Math.round(this.y.at(tick)) + 0.5;
      line(context, MARGIN.left, y, width - MARGIN.right, y);
      context.fillText(figure(tick, this.options.percent), MARGIN.left - 5, y);
    }
    context.textAlign = "center";
    for (const tick of this.x.ticks(5).filter(Number.isInteger)) {
      context.fillText(figure(tick), this.x.at(tick), height - MARGIN.bottom / 2 + 2);
    }
    if (this.options.level !== undefined) {
      context.setLineDash([2, 3]);
      context.strokeStyle = COLORS.soft;
      const y = this.y.at(this.options.level);
      line(context, MARGIN.left, y, width - MARGIN.right, y);
      context.setLineDash([]);
    }
  }

  drawBand(context, one) {
    if (!one.band) return;
    const { start, end } = this.inside(one);
    context.fillStyle = COLORS.of(one.color);
    context.globalAlpha = 0.14;
    const edge = (i, sign) => [this.x.at(one.x[i]), this.height(one.y[i] + sign * one.band[i])];
    const whole = (i) => (one.y[i] ?? null) !== null && (one.band[i] ?? null) !== null;
    for (let i = start; i < end; i += 1) {
      if (!whole(i)) continue;
      let last = i;
      while (last + 1 < end && whole(last + 1)) last += 1;
      context.beginPath();
      for (let k = i; k <= last; k += 1) context.lineTo(...edge(k, 1));
      for (let k = last; k >= i; k -= 1) context.lineTo(...edge(k, -1));
      context.fill();
      i = last;
    }
    context.globalAlpha = 1;
  }

  /** Where a number stands; on a logarithmic axis what is not above 0 is at the bottom. */
  height(value) {
    return this.y.at(this.options.log ? Math.max(value, this.y.low) : value);
  }

  drawSeries(context, one) {
    context.strokeStyle = context.fillStyle = COLORS.of(one.color);
    const smooth = this.options.smooth;
    if (smooth) context.globalAlpha = 0.25;
    this.drawLine(context, one, one.y, 1.4);
    context.globalAlpha = 1;
    if (smooth) this.drawLine(context, one, smoothed(one.y, smooth), 1.9);
  }

  drawLine(context, one, values, thick) {
    const { start, end } = this.inside(one);
    context.lineWidth = thick;
    context.beginPath();
    let pen = false;
    const alone = [];
    for (let i = start; i < end; i += 1) {
      if (values[i] === null || (this.options.log && values[i] <= 0)) {
        pen = false;
        continue;
      }
      const place = [this.x.at(one.x[i]), this.height(values[i])];
      if (pen) context.lineTo(...place);
      else context.moveTo(...place);
      pen = true;
      alone.push(place);
    }
    context.stroke();
    if (alone.length <= 60) for (const [x, y] of alone) dot(context, x, y, 2);
  }

  drawPointer(context, height) {
    if (this.drag) {
      context.fillStyle = COLORS.of(0);
      context.globalAlpha = 0.15;
      const [from, to] = this.drag;
      context.fillRect(from, MARGIN.top, to - from, height - MARGIN.top - MARGIN.bottom);
      context.globalAlpha = 1;
    }
    if (this.cursor === null) return;
    context.strokeStyle = COLORS.soft;
    context.lineWidth = 1;
    const x = this.x.at(this.cursor);
    line(context, x, MARGIN.top, x, height - MARGIN.bottom);
    for (const one of this.shown) {
      const i = nearest(one.x, this.cursor);
      if (i < 0 || one.y[i] === null || (this.options.log && one.y[i] <= 0)) continue;
      context.fillStyle = COLORS.of(one.color);
      dot(context, this.x.at(one.x[i]), this.height(one.y[i]), 3.5);
    }
  }

  /** The numbers at the cursor in words; for those who do not see it, what the plot shows. */
  describe() {
    const { label, percent, unit } = this.options;
    const told = (one) => {
      const there = one.y.filter((value) => value !== null);
      const [first, last] = [there[0], there[there.length - 1]];
      return `${one.name}: ${figure(first, percent)} to ${figure(last, percent)}`;
    };
    this.canvas.setAttribute("aria-label", `${label}. ${this.shown.map(told).join("; ")}`);
    if (this.cursor === null) {
      this.readout.textContent = "";
      return;
    }
    const numbers = this.shown.map((one) => {
      const i = nearest(one.x, this.cursor);
      if (i < 0) return "";
      const band = one.band?.[i] ?? null;
      const error = band === null ? "" : ` ± ${figure(band, percent)}`;
      const name = this.series.length > 1 ? `${one.name} ` : "";
      const where = one.x[i] === this.cursor ? "" : ` (${unit} ${figure(one.x[i])})`;
      return `${name}${figure(one.y[i], percent)}${error}${where}`;
    });
    const found = numbers.filter(Boolean).join(" · ");
    this.readout.textContent = `${unit} ${figure(this.cursor)}: ${found}`;
  }

  listen() {
    const on = (event, call) => this.canvas.addEventListener(event, call);
    const inside = (event) => {
      const right = this.canvas.clientWidth - MARGIN.right;
      return Math.min(Math.max(event.offsetX, MARGIN.left), right);
    };
    on("pointerdown", (event) => {
      if (event.button !== 0 || !this.x) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.drag = [inside(event), inside(event)];
    });
    on("pointermove", (event) => {
      if (!this.x) return;
      if (this.drag) this.drag[1] = inside(event);
      this.point(this.x.from(inside(event)));
    });
    on("pointerup", () => {
      if (!this.drag) return;
      const [from, to] = [...this.drag].sort((a, b) => a - b);
      this.drag = null;
      if (to - from > 4) this.zoom([this.x.from(from), this.x.from(to)]);
      else if (this.cursor !== null) this.options.onPick?.(this.cursor);
      this.refresh();
    });
    on("pointerleave", () => this.leave());
    on("pointercancel", () => {
      this.drag = null;
      this.leave();
    });
    on("blur", () => this.leave());
    on("dblclick", () => this.zoom(null));
    on("keydown", (event) => this.key(event));
  }

  leave() {
    if (this.drag) return;
    this.cursor = null;
    this.refresh();
  }

  /** Show the numbers of the point that is nearest to `x`. */
  point(x) {
    const near = this.shown
      .map((one) => one.x[nearest(one.x, x)])
      .filter((found) => found !== undefined)
      .sort((a, b) => Math.abs(a - x) - Math.abs(b - x));
    this.cursor = near.length ? near[0] : null;
    this.refresh();
  }

  zoom(domain) {
    this.options.onZoom?.(domain);
  }

  key(event) {
    const first = this.shown[0];
    if (!first || !this.x) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const [from, to] = [this.x.low, this.x.high];
    const middle = this.cursor ?? (from + to) / 2;
    if (step) {
      const now =
        this.cursor === null ? (step > 0 ? -1 : first.x.length) : nearest(first.x, middle);
      const next = Math.min(Math.max(now + step, 0), first.x.length - 1);
      this.point(first.x[next]);
    } else if (event.key === "Home") this.point(first.x[0]);
    else if (event.key === "End") this.point(first.x[first.x.length - 1]);
    else if (event.key === "+") this.zoom([(from + middle) / 2, (to + middle) / 2]);
    else if (event.key === "-" || event.key === "Escape") this.zoom(null);
    else if (event.key === "Enter" && this.cursor !== null) this.options.onPick?.(this.cursor);
    else return;
    event.preventDefault();
  }
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function dot(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

/** The first place in the ascending `values` that is not below `value`. */
function lowerBound(values, value) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Where in the ascending `values` the one nearest to `value` is; −1 where there is none. */
function nearest(values, value) {
  const after = lowerBound(values, value);
  if (after === 0 || after === values.length) return Math.min(after, values.length - 1);
  return value - values[after - 1] < values[after] - value ? after - 1 : after;
}

/** Draws plots as they come into sight, or change their size. */
const SIGHT = {
  plots: new Map(),
  watch(plot) {
    this.seen ??= new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const found = this.plots.get(entry.target);
        if (!found) continue;
        found.seen = entry.isIntersecting;
        if (found.seen && found.stale !== false) found.refresh();
      }
    });
    this.sized ??= new ResizeObserver((entries) => {
      for (const entry of entries) this.plots.get(entry.target)?.refresh();
    });
    this.plots.set(plot.canvas, plot);
    this.seen.observe(plot.canvas);
    this.sized.observe(plot.canvas);
    return plot;
  },
  forget(plot) {
    this.plots.delete(plot.canvas);
    this.seen.unobserve(plot.canvas);
    this.sized.unobserve(plot.canvas);
  },
  refresh() {
    for (const plot of this.plots.values()) plot.refresh();
  },
};
