// The list: filters in the address, so that a view can be sent to somebody; pages that do not move while new
// trajectories come in; the keyboard.

import * as api from "./api.js";
import { h, icon, ICONS, show } from "./dom.js";
import * as f from "./format.js";
import { makeTrouble } from "./trouble.js";

const PAGE = 50;
const LOOK_FOR_NEW = 5000;
const TYPING_PAUSE = 250;
const FATES = ["running", "ready", "leased", "delivered", "dropped", "replaced"];
const SORTS = [
  ["finished", "newest"], ["finished-", "oldest"], ["reward", "highest reward"], ["reward-", "lowest reward"],
  ["tokens", "most tokens"], ["seconds", "longest"], ["turns", "most turns"], ["staleness", "most stale"],
];
// What the address holds; all but `run` are the API's own names.
const FIELDS = ["run", "text", "stop_reason", "group", "min_reward", "max_reward", "scored", "forks", "tool_errors", "version", "sort"];

/** The last list, for stepping from one trajectory to the next: {ids, address}. */
export const last = { ids: [], address: "#/trajectories", opened: null };

export async function open(main, parameters, { signal }) {
  const filters = read(parameters);
  const state = { items: [], matched: 0, kept: 0, newest: null, at: 0, runs: [], versions: [], busy: null, fresh: 0, failed: false };
  const trouble = makeTrouble();
  const list = h("ol", { class: "rows", "aria-label": "Trajectories" });
  const looking = h("p", { class: "loading" }, "Looking…");
  const summary = h("p", { class: "summary", role: "status" });
  const more = h("button", { type: "button", class: "quiet wide", hidden: true, onclick: () => load(true) }, "More");
  const fresh = h("button", { type: "button", class: "fresh", hidden: true, onclick: () => load() });
  const bar = makeFilters(filters, state, changed);
  show(main, h("h1", { class: "hidden" }, "Trajectories"), trouble.element, bar.element,
    h("div", { class: "listing" }, h("div", { class: "list-head" }, summary, fresh), looking, list, more));
  list.addEventListener("focusin", (event) => {
    const index = [...list.children].indexOf(event.target.closest("li"));
    if (index >= 0) choose(index, false);
  });

  function changed() {
    const address = `#/trajectories${write(filters)}`;
    // Replaced, not pushed: going back leaves the list, and does not undo letters of a search.
    history.replaceState(null, "", address);
    load();
  }

  async function load(further = false) {
    try {
      // What is listed may be of other filters, where the last list did not come.
      await ask(further && !state.failed);
    } catch (error) {
      missed(error, !further);
    }
  }

  // What is listed stays. `again`: what was asked for is not there, so the poll below asks for it.
  function missed(error, again) {
    if (error.name === "AbortError" || error.status === 401) return;
    state.failed ||= again;
    if (error.status === 422) {
      state.failed = false;
      looking.remove();
      summary.textContent = error.message;
    } else if (error.status === 404 && filters.run) {
      filters.run = null;
      changed();
    } else trouble.tell(error);
  }

  /** A page of the list. Throws ApiError, and AbortError where a later one has taken its place. */
  async function ask(further = false) {
    state.busy?.abort();
    state.busy = new AbortController();
    signal.addEventListener("abort", () => state.busy.abort(), { once: true });
    const mine = state.busy.signal;
    list.setAttribute("aria-busy", "true");
    try {
      const query = { ...asked(filters), limit: PAGE, offset: further ? state.items.length : 0, upto: further ? state.newest : null };
      const page = await api.get(api.ofRun(filters.run, "trajectories"), query, mine);
      state.items = further ? [...state.items, ...page.items] : page.items;
      if (!further) {
        Object.assign(state, { newest: page.newest, at: 0, kept: page.kept });
        bar.versions(page.versions);
      }
      state.matched = page.matched;
      state.failed = false;
      trouble.clear();
      looking.remove();
      // At the end of what is kept, older ones may have gone meanwhile.
      more.hidden = state.items.length >= page.matched || page.items.length === 0;
      fresh.hidden = true;
      draw();
    } finally {
      if (!mine.aborted) list.removeAttribute("aria-busy");
    }
  }

  function draw() {
    const now = Date.now() / 1000;
    const limits = f.rewardLimits(state.items.map((item) => item.reward));
    show(list, state.items.map((item) => drawItem(item, now, limits, filters.run)));
    choose(Math.min(state.at, state.items.length - 1), false);
    const narrow = state.matched < state.kept;
    summary.textContent = state.kept === 0 ? "" : narrow ? `${f.long(state.matched)} of ${f.plural(state.kept, "trajectory", "trajectories")}` : f.plural(state.kept, "trajectory", "trajectories");
    if (state.items.length === 0) {
      show(list, h("li", { class: "empty" },
        h("p", {}, state.kept === 0 ? "Nothing has finished yet." : "None fits these filters."),
        state.kept === 0 ? h("p", { class: "faint" }, "Trajectories appear here as their sessions end.")
          : h("p", {}, h("button", { type: "button", onclick: bar.clear }, "Clear the filters"))));
    }
    last.ids = state.items.map((item) => item.trajectory_id);
    last.address = `#/trajectories${write(filters)}`;
  }

  function choose(index, focus = true) {
    const items = list.querySelectorAll("li > a");
    if (index < 0 || index >= items.length) return;
    items[state.at]?.parentElement.classList.remove("current");
    state.at = index;
    items[index].parentElement.classList.add("current");
    if (focus) {
      items[index].focus({ preventScroll: true });
      items[index].parentElement.scrollIntoView({ block: "nearest" });
    }
  }

  async function step(by) {
    if (!list.contains(document.activeElement)) return choose(state.at);
    if (by > 0 && state.at === state.items.length - 1 && !more.hidden) await load(true);
    choose(Math.max(0, Math.min(state.items.length - 1, state.at + by)));
  }

  api.poll(async () => bar.runs((await api.get("v1/runs", {}, signal)).reverse()), 15000, signal);
  api.poll(async () => {
    if (state.failed) return ask();
    if (state.newest === null || (filters.sort !== "finished" && trouble.element.hidden)) return;
    const page = await api.get(api.ofRun(filters.run, "trajectories"), { ...asked(filters), limit: 1 }, signal);
    trouble.clear();
    if (filters.sort !== "finished") return;
    const count = page.matched - state.matched;
    if (page.newest > state.newest && count > 0) {
      // An empty list, or one that nobody has touched, is simply kept up to date.
      if (state.items.length === 0) await ask();
      else {
        fresh.hidden = false;
        fresh.textContent = `${f.long(count)} new`;
      }
    }
  }, LOOK_FOR_NEW, signal, (error) => {
    // A list that is there stays as it is, also where its run is gone.
    if (state.failed) missed(error, true);
    else if (error.status !== 404) trouble.tell(error);
  });

  await load();
  // Back from one of them: there one goes on.
  const back = last.ids.indexOf(last.opened);
  if (back >= 0) choose(back);
  if (parameters.get("focus")) {
    history.replaceState(null, "", `#/trajectories${write(filters)}`);
    bar.search();
  }
  return {
    keys: {
      j: () => { step(1); },
      k: () => { step(-1); },
      ArrowDown: () => (list.contains(document.activeElement) ? void step(1) : false),
      ArrowUp: () => (list.contains(document.activeElement) ? void step(-1) : false),
      Enter: (event) => {
        if (event.target.closest("a, button, summary")) return false;
        list.querySelectorAll("li > a")[state.at]?.click();
      },
      "/": bar.search,
      r: () => { load(); },
      x: bar.clear,
    },
    help: [["j k", "next, before"], ["enter", "open"], ["/", "search"], ["r", "look again"], ["x", "clear the filters"]],
    changed: (now) => write(read(now)) === write(filters),
  };
}

// The address

function read(parameters) {
  const filters = Object.fromEntries(FIELDS.map((name) => [name, parameters.get(name)]));
  filters.stop_reason = parameters.getAll("stop_reason").filter((reason) => f.STOP_REASONS.includes(reason));
  filters.group = parameters.getAll("group").filter((fate) => FATES.includes(fate));
  if (!SORTS.some(([sort]) => sort === filters.sort)) filters.sort = "finished";
  return filters;
}

function write(filters) {
  const parameters = new URLSearchParams();
  for (const name of FIELDS) {
    for (const value of [filters[name]].flat()) {
      if (value !== null && value !== "" && !(name === "sort" && value === "finished")) parameters.append(name, value);
    }
  }
  const text = parameters.toString();
  return text && `?${text}`;
}

function asked(filters) {
  const { run, sort, ...rest } = filters;
  return { ...rest, sort: sort.replace("-", ""), descending: !sort.endsWith("-") };
}

// Filters

function makeFilters(filters, state, changed) {
  let timer = 0;
  const search = h("input", { type: "search", placeholder: "Search messages, ids, errors", "aria-label": "Search", maxlength: 200, spellcheck: "false" });
  search.value = filters.text || "";
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => set("text", search.value.trim() || null), TYPING_PAUSE);
  });
  const set = (name, value) => {
    filters[name] = value;
    changed();
    draw();
  };
  const toggle = (name, value) => set(name, filters[name].includes(value) ? filters[name].filter((one) => one !== value) : [...filters[name], value]);
  const rest = h("div", { class: "filter-rest" });
  const count = h("b", { class: "filter-count" });
  const sort = select("Order", SORTS, filters.sort, (value) => set("sort", value));
  const details = h("details", { class: "filters" }, h("summary", {}, "Filters ", count), rest);
  // Wide screens have room for all of them.
  details.open = matchMedia("(min-width: 60rem)").matches;
  const numberOf = (name, label) => {
    const input = h("input", { type: "number", step: "any", inputmode: "decimal", "aria-label": label, placeholder: label.split(" ")[0] });
    input.value = filters[name] ?? "";
    input.addEventListener("change", () => set(name, input.value === "" ? null : input.value));
    return input;
  };
  const chip = (label, on, act, cls = "") => h("button", { type: "button", class: `chip ${cls}`, "aria-pressed": String(on), onclick: act }, label);
  const flag = (name, yes, no) => [
    chip(yes, filters[name] === "true", () => set(name, filters[name] === "true" ? null : "true")),
    no && chip(no, filters[name] === "false", () => set(name, filters[name] === "false" ? null : "false")),
  ];
  const group = (name, ...inside) => h("fieldset", {}, h("legend", {}, name), inside);

  function draw() {
    const focused = rest.contains(document.activeElement) ? document.activeElement.textContent || document.activeElement.getAttribute("aria-label") : null;
    const runs = [["", "all runs"], ...state.runs.map((run) => [run.run, run.run])];
    if (filters.run && !state.runs.some((run) => run.run === filters.run)) runs.push([filters.run, filters.run]);
    const versions = [["", "any version"], ...state.versions.map((version) => [String(version), `v${version}`])];
    show(rest,
      group("Run", select("Run", runs, filters.run || "", (value) => set("run", value || null))),
      group("Ending", f.STOP_REASONS.map((reason) => chip(reason, filters.stop_reason.includes(reason), () => toggle("stop_reason", reason), `k-${f.stopKind(reason)}`))),
      group("Reward", h("span", { class: "range" }, numberOf("min_reward", "from reward"), "to", numberOf("max_reward", "to reward")), flag("scored", "scored", "not scored")),
      group("With", flag("tool_errors", "tool errors"), flag("forks", "forks")),
      group("Weights", select("Policy version", versions, filters.version || "", (value) => set("version", value || null))),
      group("Group", FATES.map((fate) => chip(fate, filters.group.includes(fate), () => toggle("group", fate)))));
    const active = FIELDS.filter((name) => !["text", "sort"].includes(name) && [filters[name]].flat().some((value) => value)).length;
    count.textContent = active || "";
    count.hidden = active === 0;
    if (focused) [...rest.querySelectorAll("button, select, input")].find((one) => (one.textContent || one.getAttribute("aria-label")) === focused)?.focus();
  }

  draw();
  return {
    element: h("search", { class: "finder" }, h("div", { class: "finder-top" }, search, sort), details),
    search: () => {
      search.focus();
      search.select();
    },
    clear: () => {
      for (const name of FIELDS) filters[name] = Array.isArray(filters[name]) ? [] : name === "sort" ? filters.sort : null;
      search.value = "";
      changed();
      draw();
    },
    runs: (found) => {
      const names = (list) => list.map((run) => run.run).join("/");
      if (names(found) === names(state.runs)) return;
      state.runs = found;
      draw();
    },
    versions: (found) => {
      if (String(found) === String(state.versions)) return;
      state.versions = found;
      draw();
    },
  };
}

function select(label, options, value, act) {
  const element = h("select", { "aria-label": label, onchange: () => act(element.value) }, options.map(([key, text]) => h("option", { value: key }, text)));
  element.value = value;
  return element;
}

// Rows

export const addressOf = (id) => `#/t/${id.split("/").map(encodeURIComponent).join("/")}`;

function drawItem(item, now, limits, run) {
  const calls = item.tool_calls > 0 && h("span", { class: item.tool_errors ? "bad" : "" }, icon(ICONS.tool, "tool calls"),
    item.tool_errors ? `${item.tool_errors} of ${item.tool_calls} failed` : f.long(item.tool_calls));
  return h("li", {}, h("a", { href: addressOf(item.trajectory_id) },
    h("span", { class: `reward ${f.rewardClass(item.reward, limits)}` }, f.reward(item.reward)),
    h("span", { class: "what" },
      h("span", { class: "opening" }, item.opening || item.task_id),
      h("span", { class: "under" },
        h("span", { class: "mono id" }, run ? item.trajectory_id.slice(item.run.length + 1) : item.trajectory_id),
        item.error && h("span", { class: "bad error" }, item.error))),
    h("span", { class: `badge k-${f.stopKind(item.stop_reason)}` }, item.stop_reason),
    h("span", { class: "figures" },
      h("span", {}, f.plural(item.turns, "turn")),
      h("span", {}, `${f.short(item.sampled)} tokens`),
      calls,
      item.segments > 1 && h("span", { class: "warn" }, icon(ICONS.fork, "segments"), f.long(item.segments)),
      h("span", {}, f.versions(item.versions), item.staleness > 0 && ` · ${item.staleness} behind`)),
    h("span", { class: "when" }, h("span", {}, f.seconds(item.seconds)), item.finished_at !== null && h("span", { class: "faint" }, f.ago(item.finished_at, now)))));
}
