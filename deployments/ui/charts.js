// Small charts in SVG: lines over time, bars of parts. Colours are classes of the style sheet.

import { framed, h, s, show } from "./dom.js";

const HEIGHT = 132;
const PAD = { left: 38, right: 10, top: 10, bottom: 20 };

/**
 * Lines over time with one shared readout.
 * `series`: [{name, cls}]; `update({points, marks})`, points [{x, values: {name: y}}] with x in seconds since the epoch, in
 * order; `marks`: [{x, label}], thin upright lines.
 */
export function timeChart(title, note, series, format, { zero = false } = {}) {
  const readout = h("output", { class: "readout" });
  const svg = s("svg", { class: "plot", height: HEIGHT, role: "img" });
  const element = h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, title), readout), svg,
    note && h("p", { class: "faint note" }, note));
  let data = { points: [], marks: [] };
  let hover = null;

  const draw = framed(() => {
    const width = svg.clientWidth || 320;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const { points, marks } = data;
    if (points.length === 0) {
      show(svg, s("text", { class: "nothing", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing yet"));
      readout.textContent = "";
      svg.setAttribute("aria-label", `${title}: nothing yet`);
      return;
    }
    const [x0, x1] = span(points);
    const [y0, y1] = range(points, series, zero);
    const x = (value) => PAD.left + ((value - x0) / (x1 - x0)) * (width - PAD.left - PAD.right);
    const y = (value) => HEIGHT - PAD.bottom - ((value - y0) / (y1 - y0)) * (HEIGHT - PAD.top - PAD.bottom);
    const parts = ticks(y0, y1).flatMap((value) => [
      s("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: PAD.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, format(value, true)),
    ]);
    for (const mark of thinned(marks, x)) {
      parts.push(s("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: PAD.top, y2: HEIGHT - PAD.bottom }),
        s("text", { class: "mark-label", x: x(mark.x) + 3, y: PAD.top + 7 }, mark.label));
    }
    for (const one of series) parts.push(path(points, one, x, y));
    parts.push(
      s("text", { class: "tick", x: PAD.left, y: HEIGHT - 5 }, clock(x0, x1)),
      s("text", { class: "tick", x: width - PAD.right, y: HEIGHT - 5, "text-anchor": "end" }, clock(x1, x0)),
    );
    const at = hover === null ? points[points.length - 1] : nearest(points, x0 + ((hover - PAD.left) / (width - PAD.left - PAD.right)) * (x1 - x0));
    if (hover !== null) parts.push(s("line", { class: "cross", x1: x(at.x), x2: x(at.x), y1: PAD.top, y2: HEIGHT - PAD.bottom }));
    for (const one of series) {
      const value = at.values[one.name];
      if (value !== null && value !== undefined) {
        parts.push(s("circle", { class: `dot ${one.cls}`, cx: x(at.x), cy: y(value), r: 3 }));
      }
    }
    show(svg, parts);
    show(readout, read(at, hover !== null, series, format));
    svg.setAttribute("aria-label", `${title}: ${[...readout.children].map((part) => part.textContent).join(", ")}`);
  });

  const move = (event) => {
    hover = event.clientX - svg.getBoundingClientRect().left;
    draw();
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => {
    hover = null;
    draw();
  });
  const sizes = new ResizeObserver(draw);
  sizes.observe(svg);
  return {
    element,
    update(next) {
      data = next;
      draw();
    },
  };
}

function read(at, withTime, series, format) {
  const parts = withTime ? [h("span", { class: "faint" }, new Date(at.x * 1000).toLocaleTimeString([], { hour12: false }))] : [];
  for (const one of series) {
    const value = at.values[one.name];
    if (value === null || value === undefined) continue;
    parts.push(h("span", { class: `key ${one.cls}` }, `${one.name} `, h("b", {}, format(value))));
  }
  return parts;
}

function path(points, one, x, y) {
  const known = points.filter((point) => point.values[one.name] !== null && point.values[one.name] !== undefined);
  const line = known.map((point) => `${x(point.x).toFixed(1)} ${y(point.values[one.name]).toFixed(1)}`);
  return s("path", { class: `line ${one.cls}`, d: line.length > 1 ? `M${line.join("L")}` : "" });
}

function span(points) {
  const first = points[0].x;
  const last = points[points.length - 1].x;
  return last > first ? [first, last] : [first - 30, first + 1];
}

function range(points, series, zero) {
  const values = points.flatMap((point) => series.flatMap((one) => point.values[one.name] ?? []));
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (zero) low = Math.min(0, low);
  if (high - low < 1e-9) {
    // One level: it lies in the middle of a range of its own size, or on the ground.
    high += Math.abs(high) * 0.25 || 1;
    low -= zero ? 0 : Math.abs(low) * 0.25 || 0;
  }
  const room = (high - low) * 0.06;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

function ticks(low, high) {
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

function nearest(points, at) {
  return points.reduce((best, point) => (Math.abs(point.x - at) < Math.abs(best.x - at) ? point : best));
}

function thinned(marks, x) {
  // A label needs room of its own.
  const kept = [];
  for (const mark of marks) if (kept.length === 0 || x(mark.x) - x(kept[kept.length - 1].x) > 30) kept.push(mark);
  return kept;
}

function clock(at, other) {
  const long = Math.abs(at - other) > 86400;
  const options = long ? { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" } : { hour: "2-digit", minute: "2-digit", second: Math.abs(at - other) < 600 ? "2-digit" : undefined };
  return new Date(at * 1000).toLocaleString([], { ...options, hour12: false });
}

/** A bar of parts: [{name, value, cls}]; `total` 0: their sum. */
export function partsBar(parts, total = 0, label = "") {
  const all = total || parts.reduce((sum, part) => sum + part.value, 0) || 1;
  const told = parts.filter((part) => part.value > 0).map((part) => `${part.name} ${part.value}`).join(", ");
  return h("div", { class: "parts", role: "img", "aria-label": `${label}${label && told ? ": " : ""}${told}` },
    parts.filter((part) => part.value > 0).map((part) =>
      h("span", { class: part.cls, title: `${part.name}: ${part.text ?? part.value}`, style: { width: `${(part.value / all) * 100}%` } })));
}

/** What the colours of a bar mean: parts with a value. */
export function partsKey(parts) {
  return h("ul", { class: "parts-key" }, parts.filter((part) => part.value > 0).map((part) =>
    h("li", {}, h("i", { class: part.cls }), `${part.name} `, h("b", {}, part.text ?? part.value))));
}
