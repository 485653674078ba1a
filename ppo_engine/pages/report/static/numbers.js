// Numbers as they are written, and as they lie packed in the page's data.

/** A number for people: some five digits. */
function figure(value, percent = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (percent) return `${figure(100 * value)} %`;
  const size = Math.abs(value);
  let text;
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) text = value.toExponential(3);
  else if (Number.isInteger(value)) text = value.toLocaleString("en-US");
  else text = String(Number(value.toPrecision(size < 1 ? 4 : 5)));
  return text.replace("-", "−");
}

/** The numbers that `text` packs, as an array of this kind. */
function unpacked(text, kind) {
  const signs = atob(text);
  const bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i += 1) bytes[i] = signs.charCodeAt(i);
  return new kind(bytes.buffer);
}

/** The numbers that are numbers. */
function finite(values) {
  return Array.from(values).filter((value) => Number.isFinite(value));
}

function mean(values) {
  const there = finite(values);
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : NaN;
}

/** What `share` of the numbers are no larger than. */
function quantile(values, share) {
  const there = finite(values).sort((a, b) => a - b);
  return there.length ? there[Math.min(there.length - 1, Math.floor(share * there.length))] : NaN;
}

/** Exponential running mean, unbiased at its beginning; gaps stay. `weight` 0 changes nothing. */
function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}
