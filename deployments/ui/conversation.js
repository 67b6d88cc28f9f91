// The conversation as it was said: roles, folded reasoning, calls with their arguments, answers with their timing, and
// the places where a new segment began.

import { copy, h, icon, ICONS, toast } from "./dom.js";
import * as f from "./format.js";

// Longer texts show their beginning until asked.
const FOLD_LINES = 24;
const FOLD_CHARS = 2400;

/** Returns {element, step(by), unfold()}. `toTokens(turn)` is called to see the tokens of a turn. */
export function drawConversation(found, toTokens) {
  const turns = found.segments.flatMap((segment) => segment.turns).filter((turn) => turn.role === "assistant");
  const parts = [];
  let segment = 0;
  found.messages.forEach((message, index) => {
    const turn = found.message_turns[index] === null ? null : turns[found.message_turns[index]];
    if (turn && turn.segment !== segment) {
      segment = turn.segment;
      parts.push(h("div", { class: "forked", role: "note" }, icon(ICONS.fork),
        h("span", {}, h("b", {}, `Segment ${segment + 1}`), ` begins with the next turn: ${found.segments[segment].fork_reason || "no reason was given"}`)));
    }
    const call = found.message_calls[index] === null ? null : found.tool_calls[found.message_calls[index]];
    parts.push(drawMessage(message, turn, call, toTokens));
  });
  if (found.messages.length === 0) parts.push(h("p", { class: "empty" }, "No messages were recorded."));
  if (found.messages_left_out > 0) parts.push(h("p", { class: "faint" }, `${f.plural(found.messages_left_out, "more message")} not shown`));
  const tied = found.message_calls.some((call) => call !== null);
  if (!tied && found.tool_calls.length > 0) parts.push(looseCalls(found.tool_calls));
  parts.push(h("p", { class: `ending k-${f.stopKind(found.stop_reason)}` }, h("b", {}, found.stop_reason), ` ${ENDINGS[found.stop_reason] || ""}`));
  const element = h("div", { class: "conversation" }, parts);
  let at = -1;
  let unfolded = false;
  return {
    element,
    step(by) {
      const messages = element.querySelectorAll(".message");
      at = Math.max(0, Math.min(messages.length - 1, at + by));
      messages[at]?.focus({ preventScroll: true });
      messages[at]?.scrollIntoView({ block: "center" });
    },
    unfold() {
      unfolded = !unfolded;
      for (const details of element.querySelectorAll("details")) details.open = unfolded;
      for (const long of element.querySelectorAll(".long")) long.classList.toggle("open", unfolded);
      toast(unfolded ? "Everything unfolded" : "Folded");
    },
  };
}

const ENDINGS = {
  stop: "– the model ended its turn, and there was nothing to add.",
  length: "– a turn was cut, by its own limit or by the model's context.",
  max_turns: "– as many turns as are allowed.",
  max_tokens: "– as many tokens as are allowed.",
  deadline: "– out of time.",
  tool_error: "– too many tool calls failed.",
  cancelled: "– the run was cancelled.",
  error: "– something under the session failed.",
};

function drawMessage(message, turn, call, toTokens) {
  const role = String(message?.role || "unknown");
  const failed = call && !call.ok;
  const name = role === "tool" && message.name ? message.name : null;
  return h("article", { class: `message m-${["system", "developer", "user", "assistant", "tool"].includes(role) ? role : "other"}${failed ? " failed" : ""}`, tabindex: "-1", "aria-label": `${role}${name ? ` ${name}` : ""}` },
    h("header", {},
      h("span", { class: "role" }, role === "tool" ? [icon(ICONS.tool), name || "tool"] : role),
      call && h("span", { class: failed ? "bad" : "good" }, icon(failed ? ICONS.cross : ICONS.check, failed ? "failed" : "ok"), failed ? (call.error || "failed").split(":")[0] : ""),
      call && h("span", { class: "faint" }, f.seconds(call.seconds)),
      turn && h("span", { class: "faint" }, `turn ${turn.number + 1}`),
      turn && turn.reward !== null && h("span", { class: "faint" }, "reward ", h("b", {}, f.reward(turn.reward))),
      h("span", { class: "grow" }),
      turn && turn.sampled > 0 && h("button", { type: "button", class: "link", title: "See its tokens", onclick: () => toTokens(turn) },
        `${f.plural(turn.sampled, "token")}`),
      turn && turn.mean_logprob !== null && h("span", { class: "faint wide-only", title: `mean log-probability; the least likely token has ${f.fixed(turn.min_logprob)}` }, `mean logprob ${f.fixed(turn.mean_logprob)}`),
      turn && turn.versions && h("span", { class: "faint" }, turn.versions[0] === turn.versions[1] ? `v${turn.versions[0]}` : `v${turn.versions[0]}–${turn.versions[1]}`),
      turn && h("span", { class: "faint" }, f.seconds(turn.seconds))),
    message.reasoning_content && h("details", { class: "reasoning" }, h("summary", {}, "Reasoning ", h("span", { class: "faint" }, firstWords(message.reasoning_content))), text(message.reasoning_content)),
    content(message.content),
    (message.tool_calls || []).map(drawCall));
}

function firstWords(long) {
  const words = String(long).trim().replace(/\s+/g, " ");
  return words.length > 90 ? `${words.slice(0, 90)}…` : words;
}

function content(value) {
  if (value === null || value === undefined || value === "") return null;
  if (typeof value === "string") return text(value);
  if (!Array.isArray(value)) return h("pre", { class: "json" }, JSON.stringify(value, null, 2));
  return value.map((part) => {
    if (typeof part === "string") return text(part);
    if (part?.type === "text" || part?.type === "input_text") return text(String(part.text ?? ""));
    // An image in the page would have to be loaded from somewhere; that it is there is enough.
    if (String(part?.type).includes("image")) return h("p", { class: "faint" }, "[image]");
    return h("pre", { class: "json" }, JSON.stringify(part, null, 2));
  });
}

function text(value) {
  const body = h("div", { class: "text" }, value);
  if (value.length < FOLD_CHARS && value.split("\n").length < FOLD_LINES) return body;
  const box = h("div", { class: "long" }, body);
  box.append(h("button", { type: "button", class: "link unfold", onclick: () => box.classList.toggle("open") },
    h("span", { class: "when-shut" }, `Show all ${f.long(value.length)} characters`), h("span", { class: "when-open" }, "Show less")));
  return box;
}

function drawCall(call) {
  const wanted = call.function || call;
  let given = wanted.arguments;
  if (typeof given === "string") {
    try {
      given = JSON.parse(given);
    } catch {
      // Shown as it is.
    }
  }
  const copyable = typeof given === "string" ? given : JSON.stringify(given, null, 2);
  return h("div", { class: "call" },
    h("div", { class: "call-name" }, icon(ICONS.tool), h("b", { class: "mono" }, wanted.name || "unnamed"),
      h("span", { class: "grow" }),
      h("button", { type: "button", class: "icon small", "aria-label": "Copy the arguments", title: "Copy the arguments", onclick: () => copy(copyable || "", "Arguments copied") }, icon(ICONS.copy))),
    given && typeof given === "object" && !Array.isArray(given)
      ? h("dl", { class: "arguments" }, Object.entries(given).map(([key, value]) => [
          h("dt", {}, key), h("dd", {}, typeof value === "string" ? value : JSON.stringify(value, null, 2))]))
      : given !== undefined && given !== null && h("pre", { class: "json" }, String(given)));
}

function looseCalls(calls) {
  return h("section", { class: "loose" }, h("h3", {}, "Tool calls"), h("ul", { class: "plain" }, calls.map((call) =>
    h("li", {}, icon(call.ok ? ICONS.check : ICONS.cross, call.ok ? "ok" : "failed"), h("b", { class: "mono" }, ` ${call.name} `),
      h("span", { class: "faint" }, f.seconds(call.seconds)), call.error && h("span", { class: "bad" }, ` ${call.error}`)))));
}
