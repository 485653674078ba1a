// From numbers to places: a linear or logarithmic axis and its ticks.

class Axis {
  /** Numbers from `low` to `high` over `length` pixels from `start`; `log` needs low > 0. */
  constructor(low, high, start, length, log = false) {
    const wide = high > low ? high - low : Math.abs(low) || 1;
    this.log = log;
    if (log) [this.low, this.high] = [low / 1.1, Math.max(high, low * 1.01) * 1.1];
    else if (high > low) [this.low, this.high] = [low, high];
    else [this.low, this.high] = [low - wide / 2, low + wide / 2];
    this.start = start;
    this.length = length;
  }

  at(value) {
    const share = this.log
      ? Math.log(value / this.low) / Math.log(this.high / this.low)
      : (value - this.low) / (this.high - this.low);
    return this.start + share * this.length;
  }

  from(pixel) {
    const share = (pixel - this.start) / this.length;
    return this.log
      ? this.low * (this.high / this.low) ** share
      : this.low + share * (this.high - this.low);
  }

  /** Round numbers on the axis, about `count`. */
  ticks(count) {
    return this.log ? this.powers(count) : this.steps(count);
  }

  steps(count) {
    const rough = (this.high - this.low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    if (Math.abs(this.low / step) > Number.MAX_SAFE_INTEGER) return found; // i + 1 would be i
    for (let i = Math.ceil(this.low / step); i * step <= this.high; i += 1) found.push(i * step);
    return found.map((tick) => Number(tick.toPrecision(12)));
  }

  powers(count) {
    const [first, last] = [Math.ceil(Math.log10(this.low)), Math.floor(Math.log10(this.high))];
    if (last - first < 1) return this.steps(count).filter((tick) => tick > 0);
    const by = Math.ceil((last - first) / count);
    const found = [];
    for (let power = first; power <= last; power += by) found.push(10 ** power);
    return found;
  }
}
