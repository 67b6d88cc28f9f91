// What is known of one token, beside the pointer, or pinned by a tap.

import { h, show } from "./dom.js";
import * as f from "./format.js";

const GAP = 8;

/** Returns {element, show(index, span, pinned), hide(), follow(), unpin()}. */
export function makeTip(data, segment, live) {
  const element = h("div", { class: "tip", role: "tooltip", hidden: true });
  let pinned = false;
  let beside = null;

  function facts(index) {
    const turn = segment.turns[data.turnOf[index]];
    const sampled = data.mask[index] === 1;
    const where = index < data.prompt ? "prompt" : turn ? (turn.role === "assistant" ? `turn ${turn.number + 1}` : turn.role) : "between turns";
    const probability = Math.exp(data.logprob[index]);
    const rows = [
      ["id", String(data.ids[index])],
      ["position", index < data.prompt ? f.long(index) : `${f.long(index)}, of the response ${f.long(index - data.prompt)}`],
      ["logprob", sampled ? f.fixed(data.logprob[index], 4) : "not sampled"],
      ["version", sampled ? `v${data.version[index]}` : "–"],
      ["in", where],
    ];
    return { rows, probability: sampled ? probability : null };
  }

  return {
    element,
    show(index, span, pin) {
      if (pinned && !pin) return;
      pinned = pin;
      const { rows, probability } = facts(index);
      show(element,
        h("p", { class: "tip-text" }, data.problem ? `token ${data.ids[index]}` : visible(data.text[index])),
        probability !== null && h("p", { class: "tip-chance" }, h("i", { style: { width: `${Math.max(1, probability * 100)}%` } }), h("span", {}, f.percent(probability))),
        h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
      element.hidden = false;
      beside = span;
      place(element, span);
      if (pin) live.textContent = `${visible(data.text[index])}; ${rows.map((row) => row.join(" ")).join("; ")}`;
    },
    hide() {
      if (!pinned) element.hidden = true;
    },
    /** The page has moved: what is pinned moves with its token, and ends where that leaves the window. */
    follow() {
      if (element.hidden) return;
      const box = pinned ? beside.getBoundingClientRect() : null;
      if (box && box.bottom > 0 && box.top < innerHeight) place(element, beside);
      else {
        pinned = false;
        element.hidden = true;
      }
    },
    unpin() {
      if (element.hidden) return false;
      pinned = false;
      element.hidden = true;
      return true;
    },
  };
}

function place(element, span) {
  // Of a token that breaks over two lines, the first part.
  const box = span.getClientRects()[0] || span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = element;
  const left = Math.max(GAP, Math.min(innerWidth - width - GAP, box.left + box.width / 2 - width / 2));
  const above = box.top - height - GAP;
  element.style.setProperty("left", `${left}px`);
  element.style.setProperty("top", `${above > 60 ? above : Math.min(innerHeight - height - GAP, box.bottom + GAP)}px`);
}

/** Text with its white space to be seen. */
function visible(text) {
  if (text === "") return "(no text of its own: part of a character, or unknown)";
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}
