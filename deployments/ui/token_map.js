// The whole segment as one strip: where the colours lie, where one is, and a way to get elsewhere.

import { framed, h } from "./dom.js";
import { VERSION_COLOURS } from "./format.js";

const HEIGHT = 30;

/** Returns {element, draw(mode), seen(), end()}. */
export function makeMap(data, root, blocks, goTo) {
  const canvas = h("canvas", { height: HEIGHT, "aria-hidden": "true" });
  const frame = h("i", { class: "map-frame" });
  const element = h("div", { class: "map", title: "The whole segment; press to go there" }, canvas, frame);
  let mode = "mask";

  const draw = framed(() => {
    const width = element.clientWidth;
    if (width === 0 || data.total === 0) return;
    const scale = Math.min(2, devicePixelRatio || 1);
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(HEIGHT * scale);
    const paint = canvas.getContext("2d");
    const style = getComputedStyle(root);
    const colours = new Map();
    const colour = (name) => {
      if (!colours.has(name)) colours.set(name, style.getPropertyValue(`--${name}`).trim());
      return colours.get(name);
    };
    for (let column = 0; column < canvas.width; column++) {
      const from = Math.floor((column / canvas.width) * data.total);
      const to = Math.max(from + 1, Math.floor(((column + 1) / canvas.width) * data.total));
      const name = from >= data.loaded ? "map-empty" : nameOf(from, Math.min(to, data.loaded));
      paint.fillStyle = colour(name);
      // What the policy did not sample is a thin line: one sees at once how much of it there is.
      const thin = name === "map-context" || name === "map-empty";
      paint.fillRect(column, thin ? canvas.height * 0.4 : 0, 1, thin ? canvas.height * 0.2 : canvas.height);
    }
    seen();
  });

  function nameOf(from, to) {
    let sampled = -1;
    let worst = -1;
    for (let index = from; index < to; index++) {
      if (!data.mask[index]) continue;
      sampled = index;
      worst = Math.max(worst, data.likely[index]);
    }
    if (sampled < 0) return "map-context";
    if (mode === "logprob") return `l${worst}`;
    if (mode === "version") return `v${data.versions.indexOf(data.version[sampled]) % VERSION_COLOURS}`;
    return mode === "reward" ? data.reward[sampled] : "sampled";
  }

  /** Which tokens are in the window. */
  function seen() {
    if (blocks.length === 0 || data.total === 0) return;
    const first = at(0);
    const last = at(innerHeight);
    frame.style.setProperty("left", `${(first / data.total) * 100}%`);
    frame.style.setProperty("width", `${Math.max(0.4, ((last - first) / data.total) * 100)}%`);
  }

  function at(y) {
    let low = 0;
    let high = blocks.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (blocks[middle].element.getBoundingClientRect().bottom < y) low = middle + 1;
      else high = middle;
    }
    const box = blocks[low].element.getBoundingClientRect();
    const inside = box.height > 0 ? Math.max(0, Math.min(1, (y - box.top) / box.height)) : 0;
    return blocks[low].from + inside * (blocks[low].to - blocks[low].from);
  }

  const go = (event) => {
    const box = element.getBoundingClientRect();
    const place = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    goTo(Math.min(data.loaded - 1, Math.floor(place * data.total)), { flash: event.type === "pointerdown" });
  };
  element.addEventListener("pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    go(event);
  });
  element.addEventListener("pointermove", (event) => event.buttons > 0 && go(event));
  const sizes = new ResizeObserver(draw);
  sizes.observe(element);

  return {
    element,
    draw(next) {
      mode = next;
      draw();
    },
    seen,
    end: () => sizes.disconnect(),
  };
}
