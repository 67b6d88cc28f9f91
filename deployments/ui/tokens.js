// The tokens of one segment, coloured by what one wants to know.
//
// Ten thousand tokens stay smooth: they are in blocks of a few hundred, a block gets its elements when it comes near
// the window, and the browser lays out only what is seen (content-visibility). A token carries a class for each of the
// colour modes, so that another mode is one attribute on the whole, and no token is touched.

import * as api from "./api.js";
import { framed, h, icon, ICONS, show, toast } from "./dom.js";
import * as f from "./format.js";
import { makeTip } from "./token_tip.js";
import { makeMap } from "./token_map.js";

// Name, label, and a short label for a phone.
export const COLOURS = [["mask", "Mask", "Mask"], ["logprob", "Log-probability", "Logprob"], ["version", "Policy version", "Version"], ["reward", "Reward", "Reward"]];
// A token is of class l0 where its probability is at least the first of these, and so on; l7 below the last.
export const LIKELY = [0.99, 0.9, 0.7, 0.5, 0.25, 0.1, 0.01];
// Tokens of one request.
const PAGE = 20000;
// A block ends at a line break after so many tokens, and after so many in any case.
const BLOCK = 240;
const BLOCK_MOST = 900;
// As many are given their elements ahead of time, when the browser has nothing else to do: then the browser's own
// search finds everything.
const FILL_ALL = 40000;
const UNLIKELY = 0.05;
const NEAR = "1200px 0px";

/** Returns {element, segment, colour, goTo, move, turn, surprise, unpin, end}. Positions count from the prompt's first token. */
export function makeTokens(found, segmentIndex, outer, { colour, chosenColour, chosenSegment }) {
  const segment = found.segments[segmentIndex];
  const total = segment.prompt + segment.response;
  const controller = new AbortController();
  outer.addEventListener("abort", () => controller.abort(), { once: true });
  const data = {
    total,
    loaded: 0,
    prompt: segment.prompt,
    ids: new Int32Array(total),
    text: new Array(total),
    mask: new Uint8Array(total),
    version: new Int32Array(total).fill(-1),
    logprob: new Float32Array(total),
    likely: new Uint8Array(total),
    reward: new Array(total).fill("rn"),
    turnOf: new Int32Array(total).fill(-1),
    versions: segment.versions.map(([version]) => version),
    problem: null,
  };
  const limits = f.rewardLimits([...(found.turn_rewards || []), found.reward]);
  markTurns(data, segment, found, limits);
  const sections = makeSections(data, segment, found);
  const blocks = [];
  const root = h("div", { class: "stream", dataset: { colour }, tabindex: "0", role: "region", "aria-label": "Tokens; arrow keys go from one to the next" }, sections.map((section) => section.element));
  const live = h("p", { class: "hidden", "aria-live": "polite" });
  const legend = h("div", { class: "legend" });
  const map = makeMap(data, root, blocks, goTo);
  const tip = makeTip(data, segment, live);
  const modes = h("div", { class: "modes", role: "radiogroup", "aria-label": "Colour by" }, COLOURS.map(([name, label, brief], index) =>
    h("button", { type: "button", role: "radio", "aria-label": label, dataset: { mode: name }, onclick: () => chosenColour(name) },
      h("span", { class: "wide-only" }, label), h("span", { class: "phone-only" }, brief), h("kbd", { "aria-hidden": "true" }, String(index + 1)))));
  modes.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const index = COLOURS.findIndex(([name]) => name === mode);
    chosenColour(COLOURS[(index + by + COLOURS.length) % COLOURS.length][0]);
    modes.querySelector('[aria-checked="true"]').focus();
  });
  const progress = h("p", { class: "loading" }, "Fetching tokens…");
  const problem = h("p", { class: "notice", hidden: true });
  const element = h("div", { class: "tokens" },
    found.segments.length > 1 && h("div", { class: "segment-tabs", role: "group", "aria-label": "Segments" }, found.segments.map((one) =>
      h("button", { type: "button", "aria-pressed": String(one.index === segmentIndex), onclick: () => chosenSegment(one.index) }, `Segment ${one.index + 1}`, h("small", {}, ` ${f.short(one.prompt + one.response)}`)))),
    segment.fork_reason && h("p", { class: "why" }, icon(ICONS.fork), `Begins anew, because ${segment.fork_reason}. What came before is its prompt.`),
    h("div", { class: "token-bar" }, modes, legend, map.element),
    problem, root, progress, live, tip.element);

  let mode = colour;
  let cursor = -1;
  let section = -1;
  let wanted = null;

  // Blocks get their elements when they come near, and are left alone from then on.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) fillBlock(entry.target.block);
  }, { rootMargin: NEAR });

  function fillBlock(block) {
    if (block.filled) return;
    block.filled = true;
    near.unobserve(block.element);
    const pieces = document.createDocumentFragment();
    for (let index = block.from; index < block.to; index++) pieces.append(drawToken(data, index));
    block.element.append(pieces);
    block.element.style.removeProperty("min-height");
  }

  function addBlocks(from, to) {
    const width = Math.max(30, (root.clientWidth || 640) / 8.2);
    for (const one of sections) {
      let start = Math.max(from, one.from);
      const end = Math.min(to, one.to);
      while (start < end) {
        let stop = start;
        let lines = 1;
        let column = 0;
        while (stop < end && stop - start < BLOCK_MOST) {
          const text = data.text[stop] ?? "";
          column += text.length;
          const breaks = text.includes("\n");
          if (breaks || column > width) {
            lines += 1;
            column = 0;
          }
          stop += 1;
          if (breaks && text.endsWith("\n") && stop - start >= BLOCK) break;
        }
        const size = `${Math.round(lines * 26)}px`;
        const block = { from: start, to: stop, filled: false, element: h("div", { class: "block", style: { "min-height": size, "contain-intrinsic-size": `auto ${size}` } }) };
        block.element.block = block;
        one.body.append(block.element);
        blocks.push(block);
        near.observe(block.element);
        start = stop;
      }
    }
  }

  async function load() {
    while (data.loaded < total) {
      const answer = await api.byId(found.trajectory_id, { segment: segmentIndex, start: data.loaded, limit: PAGE }, controller.signal);
      const { tokens } = answer;
      if (tokens.ids.length === 0) break;
      if (tokens.problem && !data.problem) {
        data.problem = tokens.problem;
        problem.hidden = false;
        problem.textContent = `Tokens are shown as numbers: ${tokens.problem}`;
      }
      take(data, tokens);
      addBlocks(tokens.start, tokens.start + tokens.ids.length);
      progress.textContent = data.loaded < total ? `${f.long(data.loaded)} of ${f.plural(total, "token")}` : "";
      drawLegend();
      map.draw(mode);
      if (wanted !== null && wanted < data.loaded) {
        const at = wanted;
        wanted = null;
        goTo(at);
      }
    }
    progress.hidden = true;
    root.dataset.complete = String(data.loaded);
    if (total <= FILL_ALL) fillIdle(0);
  }

  function fillIdle(index) {
    const later = window.requestIdleCallback || ((work) => setTimeout(() => work({ timeRemaining: () => 5 }), 30));
    later((deadline) => {
      while (index < blocks.length && deadline.timeRemaining() > 4) fillBlock(blocks[index++]);
      if (index < blocks.length && !controller.signal.aborted) fillIdle(index);
    });
  }

  function spanAt(index) {
    let low = 0;
    let high = blocks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (blocks[middle].from <= index) low = middle;
      else high = middle - 1;
    }
    fillBlock(blocks[low]);
    return blocks[low].element.children[index - blocks[low].from];
  }

  function goTo(index, { flash = true, pin = false, block = "center" } = {}) {
    if (index >= data.loaded) {
      wanted = index < total ? index : null;
      return;
    }
    cursor = index;
    const span = spanAt(index);
    span.scrollIntoView({ block });
    requestAnimationFrame(() => {
      // What lies between was only estimated before it was laid out.
      span.scrollIntoView({ block });
      mark(span);
      if (pin) tip.show(index, span, true);
      if (flash) {
        span.classList.remove("flash");
        void span.offsetWidth;
        span.classList.add("flash");
      }
    });
  }

  function mark(span) {
    root.querySelector(".t.at")?.classList.remove("at");
    span?.classList.add("at");
  }

  const token = (event) => event.target.closest?.(".t");
  root.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const span = token(event);
    if (span) tip.show(span.index, span, false);
  });
  root.addEventListener("pointerleave", () => tip.hide());
  root.addEventListener("click", (event) => {
    const span = token(event);
    if (!span || String(getSelection())) return;
    cursor = span.index;
    mark(span);
    tip.show(span.index, span, true);
  });
  const scrolled = framed(() => map.seen());
  addEventListener("scroll", () => {
    tip.follow();
    scrolled();
  }, { passive: true, signal: controller.signal });
  document.addEventListener("themechange", () => map.draw(mode), { signal: controller.signal });

  function drawLegend() {
    show(legend, legendOf(mode, data, limits));
  }

  load().catch((error) => {
    if (error.name === "AbortError") return;
    progress.hidden = false;
    progress.textContent = error.message;
  });

  return {
    element,
    segment: segmentIndex,
    goTo,
    colour(name) {
      mode = name;
      root.dataset.colour = name;
      for (const button of modes.children) {
        const on = button.dataset.mode === name;
        button.setAttribute("aria-checked", String(on));
        button.tabIndex = on ? 0 : -1;
      }
      drawLegend();
      map.draw(name);
    },
    move(by) {
      if (data.loaded === 0) return;
      // The first step goes to the first token that the policy sampled.
      const next = cursor < 0 ? Math.max(0, data.mask.indexOf(1)) : Math.max(0, Math.min(data.loaded - 1, cursor + by));
      goTo(next, { flash: false, pin: true, block: "nearest" });
    },
    turn(by) {
      section = Math.max(0, Math.min(sections.length - 1, section + by));
      const one = sections[section];
      one.element.scrollIntoView({ block: "start" });
      if (one.from < data.loaded) cursor = one.from;
      live.textContent = one.label;
    },
    surprise(by) {
      for (let index = cursor + by; index >= 0 && index < data.loaded; index += by) {
        if (data.mask[index] && data.logprob[index] < Math.log(UNLIKELY)) return goTo(index, { pin: true });
      }
      toast(`No ${by > 0 ? "further" : "earlier"} token with a probability below ${f.percent(UNLIKELY)}`);
    },
    unpin: () => tip.unpin(),
    end() {
      near.disconnect();
      map.end();
      controller.abort();
    },
  };
}

/** Put one answer of the API where the page has its arrays. */
function take(data, { start, ids, text, mask, versions, logprobs }) {
  let at = start;
  for (const [value, count] of mask) {
    data.mask.fill(value, at, at + count);
    at += count;
  }
  at = start;
  for (const [value, count] of versions) {
    data.version.fill(value, at, at + count);
    at += count;
  }
  let sampled = 0;
  for (let index = 0; index < ids.length; index++) {
    const place = start + index;
    data.ids[place] = ids[index];
    data.text[place] = text ? text[index] : `${ids[index]} `;
    if (!data.mask[place]) continue;
    const logprob = logprobs[sampled++];
    data.logprob[place] = logprob;
    const probability = Math.exp(logprob);
    const likely = LIKELY.findIndex((least) => probability >= least);
    data.likely[place] = likely < 0 ? LIKELY.length : likely;
  }
  data.loaded = start + ids.length;
}

function markTurns(data, segment, found, limits) {
  segment.turns.forEach((turn, number) => {
    const from = segment.prompt + turn.start;
    data.turnOf.fill(number, from, segment.prompt + turn.end);
    if (turn.role !== "assistant") return;
    const value = found.turn_rewards ? turn.reward : found.reward;
    data.reward.fill(f.rewardClass(value, limits), from, segment.prompt + turn.end);
  });
}

/** The prompt, each turn, and whatever lies between them. */
function makeSections(data, segment, found) {
  const sections = [];
  const add = (from, to, role, label, ...facts) => {
    if (to <= from) return;
    const body = h("div", { class: "section-body" });
    sections.push({ from, to, label, body, element: h("section", { class: `section m-${role}`, "aria-label": label },
      h("header", {}, h("span", { class: "role" }, label), facts.filter(Boolean).map((fact) => h("span", { class: "faint" }, fact))), body) });
  };
  add(0, segment.prompt, "prompt", "prompt", f.plural(segment.prompt, "token"), segment.index > 0 && "what the engine saw when this segment began");
  let at = segment.prompt;
  for (const turn of segment.turns) {
    const from = segment.prompt + turn.start;
    const to = segment.prompt + turn.end;
    add(at, from, "other", "between");
    const spoken = turn.role === "assistant";
    add(from, to, spoken ? "assistant" : turn.role === "tool" ? "tool" : "user", spoken ? `turn ${turn.number + 1}` : turn.role,
      f.plural(to - from, "token"),
      turn.mean_logprob !== null && `mean logprob ${f.fixed(turn.mean_logprob)}`,
      turn.versions && (turn.versions[0] === turn.versions[1] ? `v${turn.versions[0]}` : `v${turn.versions[0]} to v${turn.versions[1]}`),
      f.seconds(turn.seconds),
      spoken && turn.reward !== null && `reward ${f.reward(turn.reward)}`);
    at = Math.max(at, to);
  }
  add(at, data.total, "other", "after the last turn");
  return sections;
}

function drawToken(data, index) {
  const span = document.createElement("span");
  const text = data.text[index];
  let kind = "t";
  if (text === "") kind += " void";
  else if (text.includes("\n")) kind += " nl";
  else if (text.length > 2 && text[0] === "<" && text[text.length - 1] === ">" && !text.includes(" ")) kind += " special";
  if (data.mask[index]) {
    kind += ` s l${data.likely[index]} v${data.versions.indexOf(data.version[index]) % f.VERSION_COLOURS} ${data.reward[index]}`;
  }
  span.className = kind;
  span.textContent = text;
  span.index = index;
  return span;
}

function legendOf(mode, data, limits) {
  const item = (cls, text, count) => h("span", { class: "item" }, h("i", { class: `t s ${cls}` }), text, count !== undefined && h("b", {}, f.short(count)));
  const sampled = data.mask.reduce((sum, one) => sum + one, 0);
  if (mode === "mask") {
    return [item("m", "sampled by the policy: trained on", sampled), h("span", { class: "item" }, h("i", { class: "t" }), "context: not trained on", h("b", {}, f.short(data.loaded - sampled)))];
  }
  if (mode === "logprob") {
    const counts = new Array(LIKELY.length + 1).fill(0);
    for (let index = 0; index < data.loaded; index++) if (data.mask[index]) counts[data.likely[index]] += 1;
    const most = Math.max(1, ...counts);
    const names = ["≥ 99%", "≥ 90%", "≥ 70%", "≥ 50%", "≥ 25%", "≥ 10%", "≥ 1%", "< 1%"];
    return h("span", { class: "spread", role: "img", "aria-label": names.map((name, index) => `${name}: ${counts[index]}`).join(", ") }, names.map((name, index) =>
      h("span", { title: `probability ${name}: ${f.plural(counts[index], "token")}` },
        h("i", { class: "bar", style: { height: `${Math.max(counts[index] ? 2 : 0, Math.round((counts[index] / most) * 20))}px` } }),
        h("i", { class: `t s l${index}` }), h("small", {}, name))));
  }
  if (mode === "version") {
    const counts = new Map();
    for (let index = 0; index < data.loaded; index++) if (data.mask[index]) counts.set(data.version[index], (counts.get(data.version[index]) || 0) + 1);
    return data.versions.map((version, index) => item(`v${index % f.VERSION_COLOURS}`, `v${version}`, counts.get(version) || 0));
  }
  const values = new Set();
  for (let index = 0; index < data.loaded; index++) if (data.mask[index]) values.add(data.reward[index]);
  if (values.size === 1 && values.has("rn")) return item("rn", "not scored");
  return [h("span", { class: "item" }, f.reward(limits[0]), h("span", { class: "scale" }, Array.from({ length: 9 }, (_, index) => h("i", { class: `t s r${index}` }))), f.reward(limits[1])),
    values.has("rn") && item("rn", "not scored"), h("span", { class: "faint" }, "of each turn where the environment gives it, else of the whole")];
}
