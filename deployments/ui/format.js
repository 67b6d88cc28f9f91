// Figures as people read them.

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
// Distinct colours of policy versions; further ones begin again.
export const VERSION_COLOURS = 10;

const whole = new Intl.NumberFormat("en");

/** 1234567 → 1.2M */
export const short = (value) => (value < 10000 ? whole.format(value) : compact.format(value));

/** 1234567 → 1,234,567 */
export const long = (value) => whole.format(value);

export function plural(count, one, many = `${one}s`) {
  return `${long(count)} ${count === 1 ? one : many}`;
}

/** A reward; what was not scored is no number. */
export function reward(value) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(Math.abs(value) >= 1000 ? 0 : Math.abs(value) >= 10 ? 1 : 2);
  return text.replace("-", "−");
}

/** A number with so many digits after the point, and a real minus sign. */
export function fixed(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

/** How long ago. */
export function ago(at, now = Date.now() / 1000) {
  const past = Math.max(0, now - at);
  if (past < 5) return "now";
  if (past < 60) return `${Math.floor(past)} s ago`;
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return `${Math.floor(past / 86400)} d ago`;
}

export function percent(value) {
  if (value >= 0.9995) return "100%";
  if (value < 0.001) return "<0.1%";
  return `${(value * 100).toFixed(value < 0.1 || value > 0.99 ? 1 : 0)}%`;
}

export function megabytes(value) {
  return value >= 1024 ? `${(value / 1024).toFixed(1)} GiB` : `${Math.round(value)} MiB`;
}

/** What a stop reason is a kind of, which is its colour. */
export function stopKind(reason) {
  if (reason === "stop") return "good";
  if (reason === "error") return "bad";
  if (reason === "tool_error") return "poor";
  if (reason === "cancelled") return "none";
  return "cut";
}

export const STOP_REASONS = ["stop", "length", "max_turns", "max_tokens", "deadline", "tool_error", "cancelled", "error"];

/** Versions of a trajectory in a word: v3, or v3–5. */
export function versions(pairs) {
  if (!pairs || pairs.length === 0) return "–";
  const first = pairs[0][0];
  const last = pairs[pairs.length - 1][0];
  return first === last ? `v${first}` : `v${first}–${last}`;
}

/** A reward as one of nine classes, r0 (worst) to r8 (best), on the scale of `limits`. */
export function rewardClass(value, [low, high] = [0, 1]) {
  if (value === null || value === undefined) return "rn";
  const place = high > low ? (value - low) / (high - low) : 0.5;
  return `r${Math.max(0, Math.min(8, Math.round(place * 8)))}`;
}

/** The scale for some rewards: 0 to 1 where they are within it, else symmetric around 0. */
export function rewardLimits(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  if (known.every((value) => value >= 0 && value <= 1)) return [0, 1];
  const most = Math.max(...known.map(Math.abs));
  return [-most, most];
}
