// One trajectory: who it is, how it ended and where its time went; the conversation; the tokens.

import * as api from "./api.js";
import { partsBar, partsKey } from "./charts.js";
import { copy, h, icon, ICONS, show, toast } from "./dom.js";
import * as f from "./format.js";
import { drawConversation } from "./conversation.js";
import { COLOURS, makeTokens } from "./tokens.js";
import { addressOf, last } from "./trajectories.js";
import { makeTrouble } from "./trouble.js";

const ASK_AGAIN = 2000;

export async function open(main, parameters, { signal, id }) {
  const trouble = makeTrouble();
  const before = main.querySelector(".trajectory");
  before?.setAttribute("aria-busy", "true");
  show(main, trouble.element, before || h("p", { class: "loading" }, "Looking…"));
  // Its conversation first, which is small; tokens when they are looked at.
  const found = await api.patiently(() => api.byId(id, { limit: 0 }, signal), ASK_AGAIN, signal, trouble.tell);
  const state = {
    view: parameters.get("view") === "tokens" ? "tokens" : "conversation",
    colour: COLOURS.some(([name]) => name === parameters.get("colour")) ? parameters.get("colour") : "mask",
    segment: Math.min(found.segments.length - 1, Number(parameters.get("segment")) || 0),
    tokens: null,
  };
  const body = h("div", { class: "body", role: "tabpanel", "aria-labelledby": "tab-conversation" });
  const tabs = ["conversation", "tokens"].map((name) =>
    h("button", { type: "button", role: "tab", id: `tab-${name}`, onclick: () => turnTo({ view: name }) }, name[0].toUpperCase() + name.slice(1)));
  const tablist = h("div", { class: "tabs", role: "tablist", "aria-label": "What is shown" }, tabs);
  show(main, h("div", { class: "trajectory" }, head(found), h("div", { class: "split" },
    h("div", { class: "content" }, tablist, body), aside(found, (segment) => turnTo({ view: "tokens", segment })))));
  scrollTo(0, 0);
  last.opened = found.trajectory_id;
  document.title = `${found.trajectory_id} · rollout`;
  signal.addEventListener("abort", () => (document.title = "rollout"), { once: true });

  const conversation = drawConversation(found, (turn) => turnTo({ view: "tokens", segment: turn.segment }, turn));

  function turnTo(change, turn = null) {
    Object.assign(state, change);
    const where = new URLSearchParams();
    if (state.view === "tokens") {
      where.set("view", "tokens");
      if (state.colour !== "mask") where.set("colour", state.colour);
      if (state.segment > 0) where.set("segment", state.segment);
    }
    const query = where.toString();
    history.replaceState(null, "", addressOf(found.trajectory_id) + (query && `?${query}`));
    draw();
    if (turn && state.tokens) state.tokens.goTo(found.segments[turn.segment].prompt + turn.start);
  }

  function draw() {
    for (const tab of tabs) {
      const on = tab.id === `tab-${state.view}`;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    body.setAttribute("aria-labelledby", `tab-${state.view}`);
    if (state.view === "conversation") {
      show(body, conversation.element);
      return;
    }
    if (!state.tokens || state.tokens.segment !== state.segment) {
      state.tokens?.end();
      state.tokens = makeTokens(found, state.segment, signal, {
        colour: state.colour,
        chosenColour: (colour) => turnTo({ colour }),
        chosenSegment: (segment) => turnTo({ segment }),
      });
    }
    state.tokens.colour(state.colour);
    if (body.firstChild !== state.tokens.element) show(body, state.tokens.element);
  }

  tablist.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    turnTo({ view: state.view === "tokens" ? "conversation" : "tokens" });
    tabs.find((tab) => tab.tabIndex === 0).focus();
    event.preventDefault();
  });

  draw();

  const other = (by) => {
    const next = last.ids[last.ids.indexOf(found.trajectory_id) + by];
    if (last.ids.includes(found.trajectory_id) && next) location.hash = addressOf(next) + (location.hash.split("?")[1] ? `?${location.hash.split("?")[1]}` : "");
    else toast(by > 0 ? "This is the last of the list" : "This is the first of the list");
  };
  const colours = Object.fromEntries(COLOURS.map(([name], index) => [String(index + 1), () => turnTo({ view: "tokens", colour: name })]));
  const inTokens = (act) => () => (state.view === "tokens" ? act(state.tokens) : false);
  return {
    keys: {
      ...colours,
      c: () => turnTo({ view: "conversation" }),
      t: () => turnTo({ view: "tokens" }),
      j: () => (state.view === "tokens" ? state.tokens.turn(1) : conversation.step(1)),
      k: () => (state.view === "tokens" ? state.tokens.turn(-1) : conversation.step(-1)),
      e: () => conversation.unfold(),
      "]": () => other(1),
      "[": () => other(-1),
      n: inTokens((tokens) => tokens.surprise(1)),
      N: inTokens((tokens) => tokens.surprise(-1)),
      ArrowRight: (event) => (state.view === "tokens" && !event.target.closest("[role=tab]") ? state.tokens.move(1) : false),
      ArrowLeft: (event) => (state.view === "tokens" && !event.target.closest("[role=tab]") ? state.tokens.move(-1) : false),
      s: inTokens(() => turnTo({ segment: (state.segment + 1) % found.segments.length })),
      y: () => { copy(found.trajectory_id, "Id copied"); },
      Escape: () => {
        if (state.view === "tokens" && state.tokens.unpin()) return;
        location.hash = last.address;
      },
    },
    help: [
      ["c t", "conversation, tokens"], ["1 2 3 4", COLOURS.map(([, label]) => label.toLowerCase()).join(", ")],
      ["j k", "next turn, turn before"], ["← →", "token by token"], ["n N", "next unlikely token, the one before"],
      ["s", "next segment"], ["e", "unfold reasoning and long texts"], ["[ ]", "trajectory before, next"], ["y", "copy the id"], ["esc", "back to the list"],
    ],
    changed: (now) => {
      const view = now.get("view") === "tokens" ? "tokens" : "conversation";
      return view === state.view && (view === "conversation" || (now.get("colour") || "mask") === state.colour);
    },
  };
}

function head(found) {
  const { summary } = found;
  const limits = f.rewardLimits(found.siblings.map((one) => one.reward));
  const fate = { running: "group not complete", ready: "ready for delivery", leased: "with a trainer", delivered: "delivered", dropped: "dropped", replaced: "played again" };
  return h("header", { class: "head" },
    h("nav", { class: "crumbs", "aria-label": "Where" },
      h("a", { href: last.address }, icon(ICONS.left), "Trajectories"), h("a", { href: `#/trajectories?run=${encodeURIComponent(found.run)}` }, found.run)),
    h("div", { class: "title" },
      h("span", { class: `reward big ${f.rewardClass(found.reward, limits)}`, title: "reward" }, f.reward(found.reward)),
      h("h1", { class: "mono" }, found.trajectory_id),
      h("button", { type: "button", class: "icon", "aria-label": "Copy the id", title: "Copy the id (y)", onclick: () => copy(found.trajectory_id, "Id copied") }, icon(ICONS.copy))),
    h("p", { class: "facts" },
      h("span", { class: `badge k-${f.stopKind(found.stop_reason)}` }, found.stop_reason),
      h("span", {}, h("b", {}, f.long(summary.turns)), summary.turns === 1 ? " turn" : " turns"),
      h("span", {}, h("b", {}, f.long(summary.sampled)), " tokens sampled"),
      h("span", {}, h("b", {}, f.versions(summary.versions))),
      summary.tool_calls > 0 && h("span", { class: summary.tool_errors ? "bad" : "" }, h("b", {}, f.long(summary.tool_calls)), summary.tool_calls === 1 ? " tool call" : " tool calls",
        summary.tool_errors > 0 && `, ${f.long(summary.tool_errors)} failed`),
      summary.segments > 1 && h("span", { class: "warn" }, icon(ICONS.fork), h("b", {}, f.long(summary.segments)), " segments"),
      h("span", {}, h("b", {}, f.seconds(found.timing.total_s))),
      found.attempts > 1 && h("span", { class: "warn" }, `attempt ${found.attempts}`),
      h("span", { class: "faint" }, fate[summary.group], summary.group_reason && `: ${summary.group_reason}`),
      summary.finished_at !== null && h("span", { class: "faint" }, f.ago(summary.finished_at))),
    found.error && h("p", { class: "problem" }, found.error));
}

function aside(found, toSegment) {
  const { timing } = found;
  const parts = [
    { name: "engine", value: timing.engine_s, cls: "c-engine" },
    { name: "tools", value: timing.tool_s, cls: "c-tools" },
    { name: "environment", value: timing.env_s, cls: "c-env" },
  ];
  // What is left of the whole went to rendering, parsing and waiting for a turn.
  parts.push({ name: "other", value: Math.max(0, timing.total_s - parts.reduce((sum, part) => sum + part.value, 0)), cls: "c-other" });
  for (const part of parts) part.text = f.seconds(part.value);
  const limits = f.rewardLimits(found.siblings.map((one) => one.reward));
  const known = found.metadata && Object.keys(found.metadata).length > 0;
  // Narrow screens show it on demand.
  return h("aside", { class: "side", "aria-label": "Facts" }, h("details", { open: matchMedia("(min-width: 60.01rem)").matches },
    h("summary", {}, "Group, time, segments, metadata"),
    found.siblings.length > 1 && h("section", {}, h("h2", {}, "Its group"),
      h("ol", { class: "siblings" }, found.siblings.map((one) => h("li", {}, h("a", {
        class: `reward ${f.rewardClass(one.reward, limits)}`, href: addressOf(one.trajectory_id), title: `${one.trajectory_id}: ${one.stop_reason}`,
        "aria-current": one.trajectory_id === found.trajectory_id ? "page" : null,
      }, f.reward(one.reward)))))),
    h("section", {}, h("h2", {}, "Time"), partsBar(parts, 0, "time"), partsKey(parts),
      h("p", { class: "faint small" }, `${f.seconds(timing.total_s)} in all, after ${f.seconds(timing.queue_s)} in the queue`)),
    h("section", {}, h("h2", {}, found.segments.length > 1 ? "Segments" : "Tokens"), h("ol", { class: "segments" }, found.segments.map((segment) =>
      h("li", {}, h("button", { type: "button", onclick: () => toSegment(segment.index) },
        h("span", {}, found.segments.length > 1 ? `Segment ${segment.index + 1}` : "Show them"),
        h("span", { class: "faint" }, `${f.short(segment.prompt)} prompt + ${f.short(segment.response)} response, ${f.short(segment.sampled)} sampled`)),
      segment.fork_reason && h("p", { class: "why" }, icon(ICONS.fork), segment.fork_reason))))),
    found.segments.some((segment) => segment.versions.length > 0) && h("section", {}, h("h2", {}, "Policy versions"),
      h("ul", { class: "plain" }, found.summary.versions.map(([version, count]) => h("li", {}, h("b", {}, `v${version}`), ` ${f.plural(count, "token")}`)))),
    found.turn_rewards && h("section", {}, h("h2", {}, "Reward of each turn"),
      h("ol", { class: "siblings" }, found.turn_rewards.map((value) => h("li", {}, h("span", { class: `reward ${f.rewardClass(value, f.rewardLimits(found.turn_rewards))}` }, f.reward(value)))))),
    known && h("section", {}, h("h2", {}, "Metadata"), h("pre", { class: "json" }, JSON.stringify(found.metadata, null, 2)))));
}
