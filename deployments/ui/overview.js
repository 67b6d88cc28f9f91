// What goes on now: the engines, loading or ready; the runs; and the course of one of them.

import * as api from "./api.js";
import { partsBar, partsKey, timeChart } from "./charts.js";
import { framed, h, show } from "./dom.js";
import * as f from "./format.js";
import { makeTrouble } from "./trouble.js";

const EVERY = 2000;
// Runs that are listed at once; the rest is one click away.
const LISTED = 12;

export async function open(main, parameters, { signal }) {
  const state = { runs: [], weights: null, loading: new Map(), phase: null, starting: false, chosen: parameters.get("run"), rates: new Map(), all: false };
  const trouble = makeTrouble();
  const tiles = h("dl", { class: "tiles" });
  const engines = h("section", { class: "panel engines", "aria-label": "Engines", hidden: true });
  const runs = h("div", { class: "runs" }, h("p", { class: "loading" }, "Looking…"));
  const course = makeCourse();
  show(main,
    h("h1", { class: "hidden" }, "Overview"),
    trouble.element,
    tiles,
    engines,
    h("div", { class: "columns" },
      h("section", { "aria-labelledby": "runs-title" }, h("h2", { id: "runs-title" }, "Runs"), runs),
      h("section", { class: "course", "aria-labelledby": "course-title" }, course.element)));

  let opened = false;
  const draw = framed(() => {
    if (signal.aborted) return;
    drawEngines(engines, state);
    // Engines load long before anybody can say which runs there are.
    if (!opened) return;
    show(tiles, drawTiles(state));
    drawRuns(runs, state, choose, () => {
      state.all = !state.all;
      draw();
    });
    course.name(state);
  });

  function choose(name) {
    state.chosen = name;
    follow();
    draw();
  }

  const lookAtRuns = async () => {
    const found = await api.get("v1/runs", {}, signal);
    measure(state, found);
    // Newest first: what one has just started is what one wants to see.
    state.runs = found.reverse();
    state.starting = false;
    trouble.clear();
    if (!opened) {
      opened = true;
      follow();
    }
    draw();
  };
  api.poll(lookAtRuns, EVERY, signal, (error) => {
    // A cluster that is not ready says so; how far its engines are is known all the same.
    state.starting = error.status === 503;
    trouble.tell(error);
    draw();
  });
  api.poll(async () => {
    state.weights = await api.get("v1/weights", {}, signal);
    draw();
  }, EVERY, signal);
  followLoading(state, draw, signal);

  // One run is followed closely: its counts at every change, its course every few seconds.
  let following = new AbortController();
  function follow() {
    following.abort();
    following = new AbortController();
    signal.addEventListener("abort", () => following.abort(), { once: true });
    const mine = following.signal;
    const name = chosen(state)?.run;
    if (!name) return;
    api.poll(async () => course.update(await api.get(api.ofRun(name, "history"), {}, mine)), EVERY, mine);
    const hear = (info, event) => {
      if (event !== "run") return;
      const index = state.runs.findIndex((run) => run.run === info.run);
      if (index >= 0) state.runs[index] = info;
      draw();
    };
    api.stream(api.ofRun(name, "events"), hear, mine).catch(() => {});
  }

  const step = (by) => {
    const names = visible(state).map((run) => run.run);
    const at = names.indexOf(chosen(state)?.run);
    const next = names[Math.max(0, Math.min(names.length - 1, at + by))];
    if (next) choose(next);
    runs.querySelector(`[aria-pressed="true"]`)?.scrollIntoView({ block: "nearest" });
  };
  return {
    keys: {
      j: () => step(1),
      k: () => step(-1),
      Enter: (event) => {
        if (event.target.closest("a, button:not(.run-name)")) return false;
        const run = chosen(state);
        if (run) location.hash = `#/trajectories?run=${encodeURIComponent(run.run)}`;
      },
    },
    help: [["j k", "next run, run before"], ["enter", "its trajectories"], ["/", "search trajectories"]],
  };
}

const chosen = (state) =>
  state.runs.find((run) => run.run === state.chosen) || state.runs.find((run) => run.running || run.waiting) || state.runs[0];

function visible(state) {
  if (state.all) return state.runs;
  const busy = state.runs.filter((run) => run.running || run.waiting);
  return [...busy, ...state.runs.filter((run) => !busy.includes(run))].slice(0, LISTED);
}

// Tokens a second, from one look to the next.
function measure(state, found) {
  const now = performance.now() / 1000;
  for (const run of found) {
    const before = state.rates.get(run.run);
    if (!before || now - before.at > 1) {
      const rate = before ? Math.max(0, (run.tokens - before.tokens) / (now - before.at)) : null;
      const smooth = rate === null ? null : before.rate === null ? rate : before.rate * 0.6 + rate * 0.4;
      state.rates.set(run.run, { at: now, tokens: run.tokens, rate: smooth });
    }
  }
}

function drawTiles(state) {
  const sum = (key) => state.runs.reduce((total, run) => total + run[key], 0);
  const rates = state.runs.map((run) => state.rates.get(run.run)?.rate ?? null).filter((rate) => rate !== null);
  const rate = rates.reduce((total, value) => total + value, 0);
  const scored = sum("scored");
  const tile = (name, value, detail = "") => h("div", {}, h("dt", {}, name), h("dd", {}, value, detail && h("small", {}, ` ${detail}`)));
  const active = state.runs.filter((run) => run.running || run.waiting).length;
  return [
    tile("Policy version", state.weights ? `v${state.weights.version}` : "–"),
    !state.weights?.file && tile("Engines", ...engineTile(state)),
    tile("Runs", f.long(active), `active of ${f.long(state.runs.length)}`),
    !state.weights?.file && tile("Sessions", f.long(sum("sessions_running")), "playing"),
    tile("Trajectories", f.short(sum("sessions_done"))),
    state.weights?.file ? tile("Tokens", f.short(sum("tokens"))) : tile("Sampled", f.short(Math.round(rates.length ? rate : 0)), "tokens/s"),
    tile("Mean reward", scored ? f.fixed(sum("reward_sum") / scored) : "–"),
  ];
}

function engineTile(state) {
  if (!state.weights) return ["–"];
  const replicas = Object.values(state.weights.replicas);
  const fit = replicas.filter((replica) => replica.health === undefined || replica.health === "healthy").length;
  return [`${fit}`, fit === replicas.length ? "ready" : `of ${replicas.length} ready`];
}

// Engines: what is loading, and whose weights are not the current ones

async function followLoading(state, draw, signal) {
  // The stream ends when all is ready or one has failed; then it is asked again now and then, for what comes later.
  const round = async () => {
    state.loading.clear();
    await api.stream("v1/loading/progress", (event) => {
      if (event.stage === "ready" || event.stage === "error") {
        state.phase = event.stage;
        if (event.stage === "error") state.problem = event;
      } else {
        state.phase = "loading";
        const replica = state.loading.get(event.replica) || new Map();
        replica.set(`${event.stage}/${event.rank ?? 0}`, event);
        state.loading.set(event.replica, replica);
      }
      draw();
    }, signal);
  };
  api.poll(round, 5000, signal, (error) => {
    if (error.status !== 503) return;
    // Nothing is loading, and nothing is ready.
    state.nothing = error.message;
    if (state.phase !== "error") state.phase = null;
    draw();
  });
}

function drawEngines(element, state) {
  const replicas = Object.entries(state.weights?.replicas || {});
  const behind = replicas.filter(([, replica]) => replica.health && replica.health !== "healthy");
  const loading = state.starting || state.phase === "loading" || state.phase === "error";
  element.hidden = !loading && behind.length === 0;
  if (element.hidden) return;
  // Engines that are ready while the cluster is not: it has more parts than engines.
  const ready = loading && state.phase === "ready";
  const rows = loading && !ready ? [...state.loading] : [];
  const why = ready ? "The rest of the cluster comes next." : state.nothing || "None of them has reported yet.";
  show(element,
    h("h2", {}, state.phase === "error" ? "An engine did not come up" : ready ? "Engines are ready" : loading ? "Engines are loading" : "Engines are catching up"),
    state.phase === "error" && h("p", { class: "problem" }, state.problem.message),
    loading && state.phase !== "error" && rows.length === 0 && h("p", { class: "faint" }, why),
    rows.length > 0 && h("ul", { class: "loads" }, rows.map(([name, events]) => loadingRow(name, [...events.values()]))),
    behind.length > 0 && h("ul", { class: "loads" }, behind.map(([name, replica]) =>
      h("li", {}, h("span", { class: "mono" }, shortName(name)),
        h("span", {}, `${replica.health}, carries ${replica.version === null ? "nothing yet" : `v${replica.version}`}`),
        replica.reason && h("span", { class: "faint" }, replica.reason)))));
}

function loadingRow(name, events) {
  const ranks = events.filter((event) => event.stage === "loading_to_vram");
  const download = events.find((event) => event.stage === "downloading");
  if (events.some((event) => event.stage === "warming_up")) return row(name, 1, "warming up");
  if (ranks.length > 0) {
    const read = ranks.reduce((sum, rank) => sum + rank.bytes_read, 0);
    const total = ranks.reduce((sum, rank) => sum + (rank.bytes_total || 0), 0);
    const layers = ranks.every((rank) => rank.layers_total) ? Math.min(...ranks.map((rank) => rank.layers_loaded)) : null;
    const memory = ranks.reduce((sum, rank) => sum + rank.vram_mb, 0);
    const what = [layers !== null && `layer ${layers} of ${ranks[0].layers_total}`, f.megabytes(memory), f.plural(ranks.length, "rank")];
    return row(name, total ? read / total : null, what.filter(Boolean).join(" · "));
  }
  if (download) {
    const total = download.bytes_total;
    return row(name, total ? download.bytes_downloaded / total : null,
      `downloading ${f.megabytes(download.bytes_downloaded / 2 ** 20)}${total ? ` of ${f.megabytes(total / 2 ** 20)}` : ""}`);
  }
  return row(name, null, "starting");
}

function row(name, fraction, text) {
  const bar = h("progress", { max: 1, "aria-label": `${shortName(name)}: ${text}` });
  if (fraction !== null) bar.value = fraction;
  return h("li", {}, h("span", { class: "mono" }, shortName(name)), bar, h("span", { class: "faint" }, text));
}

const shortName = (name) => (name || "").split("#").pop();

// Runs

function drawRuns(element, state, choose, toggle) {
  if (state.runs.length === 0) {
    show(element, h("div", { class: "empty" },
      h("p", {}, "No runs yet."),
      h("p", { class: "faint" }, "Submit tasks with RolloutClient, or with `rollout run`; they appear here at once.")));
    return;
  }
  const current = chosen(state);
  const listed = visible(state);
  // What has the focus is made anew as well, and gets it back.
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.run : null;
  show(element,
    listed.map((run) => drawRun(run, run === current, choose, state.rates.get(run.run)?.rate)),
    state.runs.length > LISTED && h("button", { type: "button", class: "quiet", onclick: toggle },
      state.all ? "Show fewer" : `Show all ${f.long(state.runs.length)}`));
  if (focused) [...element.querySelectorAll("[data-run]")].find((button) => button.dataset.run === focused)?.focus();
}

export function runParts(run) {
  const dropped = Object.values(run.dropped).reduce((sum, count) => sum + count, 0);
  return [
    { name: "delivered", value: run.delivered, cls: "c-delivered" },
    { name: "leased", value: run.leased, cls: "c-leased" },
    { name: "ready", value: run.ready, cls: "c-ready" },
    { name: "running", value: run.running, cls: "c-running" },
    { name: "dropped", value: dropped, cls: "c-dropped" },
    { name: "waiting", value: run.waiting, cls: "c-waiting" },
  ];
}

const HELD = {
  staleness: "waits for new weights",
  memory: "waits for batches to be acknowledged",
  paused: "paused",
};

function drawRun(run, current, choose, rate) {
  const parts = runParts(run);
  const done = run.delivered + Object.values(run.dropped).reduce((sum, count) => sum + count, 0);
  const finished = run.submitted > 0 && done === run.submitted;
  const word = run.state !== "running" ? run.state : finished ? "done" : run.submitted === 0 ? "no tasks" : run.held_by ? "held" : run.running || run.waiting ? "running" : "played";
  const stops = Object.entries(run.stop_reasons).sort((one, other) => f.STOP_REASONS.indexOf(one[0]) - f.STOP_REASONS.indexOf(other[0]));
  const fact = (name, value, cls = "") => h("span", { class: cls }, `${name} `, h("b", {}, value));
  return h("article", { class: current ? "run current" : "run" },
    h("header", {},
      h("button", { type: "button", class: "run-name", "aria-pressed": String(current), dataset: { run: run.run }, onclick: () => choose(run.run) }, run.run),
      h("span", { class: `badge s-${word.replace(" ", "-")}` }, word),
      h("span", { class: "grow" }),
      h("span", { class: "count" }, h("b", {}, f.long(done)), ` of ${f.plural(run.submitted, "group")}`)),
    partsBar(parts, run.submitted, "groups"),
    partsKey(parts),
    h("p", { class: "facts" },
      fact("reward", run.scored ? f.fixed(run.reward_sum / run.scored) : "–"),
      fact("sessions", `${f.short(run.sessions_done)}${run.sessions_running ? ` + ${f.long(run.sessions_running)} playing` : ""}`),
      fact("tokens", `${f.short(run.tokens)}${rate ? ` · ${f.short(Math.round(rate))}/s` : ""}`),
      run.tool_calls > 0 && fact("tool calls", `${f.short(run.tool_calls)}${run.tool_errors ? `, ${f.percent(run.tool_errors / run.tool_calls)} failed` : ""}`),
      run.forks > 0 && fact("forks", f.short(run.forks)),
      run.delivered + run.leased > 0 && fact("staleness", `at most ${run.staleness_max}`),
      run.held_by && h("span", { class: "held" }, HELD[run.held_by] || run.held_by),
      run.filter_error && h("span", { class: "problem" }, `filter: ${run.filter_error}`)),
    stops.length > 0 && h("p", { class: "stops" }, stops.map(([reason, count]) =>
      h("a", { class: `chip k-${f.stopKind(reason)}`, href: `#/trajectories?run=${encodeURIComponent(run.run)}&stop_reason=${reason}` }, reason, " ", h("b", {}, f.short(count))))),
    Object.keys(run.dropped).length > 0 && h("p", { class: "faint small" }, `dropped: ${Object.entries(run.dropped).map(([reason, count]) => `${reason} ${f.long(count)}`).join(", ")}`),
    h("a", { class: "more", href: `#/trajectories?run=${encodeURIComponent(run.run)}` }, "Trajectories"));
}

// The course of one run

// Sessions after which a reward counts a third (1/e) as much in the smoothed mean.
const SMOOTH = 64;

/** Tokens a second in each stretch that is over; stretches in which nothing finished are at 0. */
function rates(points, seconds, now) {
  const over = points.filter((point) => point.at + seconds <= now || points.length === 1);
  const point = (at, tokens) => ({ x: at, values: { "tokens/s": tokens / seconds } });
  return over.flatMap(({ at, tokens }, index) => {
    const before = index > 0 ? over[index - 1].at : at - seconds;
    const gap = at - before > seconds * 1.5 ? [point(before + seconds, 0), point(at - seconds, 0)] : [];
    return [...gap, point(at, tokens)];
  });
}

/** The mean reward of each stretch, and a running mean in which a session counts the less the longer ago it was. */
function smoothed(points) {
  let sum = 0;
  let weight = 0;
  return points.filter((point) => point.scored > 0).map((point) => {
    const kept = Math.exp(-point.scored / SMOOTH);
    sum = sum * kept + point.reward_sum;
    weight = weight * kept + point.scored;
    return { x: point.at, values: { mean: point.reward_sum / point.scored, smoothed: sum / weight } };
  });
}

function makeCourse() {
  const title = h("h2", { id: "course-title" }, "Over time");
  const whole = (value) => f.fixed(value, Number.isInteger(value) ? 0 : 1);
  const reward = timeChart("Reward", null,
    [{ name: "mean", cls: "p-e" }, { name: "smoothed", cls: "p-a" }], (value) => f.fixed(value, 2));
  const staleness = timeChart("Staleness", "Versions between a trajectory's oldest token and the weights when it finished.",
    [{ name: "most", cls: "p-c" }, { name: "mean", cls: "p-b" }], whole, { zero: true });
  const tokens = timeChart("Sampled tokens a second", null, [{ name: "tokens/s", cls: "p-d" }], (value) => f.short(Math.round(value)), { zero: true });
  return {
    element: [title, reward.element, staleness.element, tokens.element],
    name(state) {
      const run = chosen(state);
      title.textContent = run ? `Over time: ${run.run}` : "Over time";
    },
    update(history) {
      const { points, seconds, now } = history;
      // Upright lines where new weights came.
      const marks = points.filter((point, index) => index > 0 && point.version !== points[index - 1].version).map((point) => ({ x: point.at, label: `v${point.version}` }));
      const at = (make) => points.map((point) => ({ x: point.at, values: make(point) }));
      reward.update({
        marks,
        points: smoothed(points),
      });
      staleness.update({
        marks: [],
        points: at((point) => ({ mean: point.aged ? point.staleness_sum / point.aged : null, most: point.aged ? point.staleness_max : null })).filter((point) => point.values.mean !== null),
      });
      tokens.update({ marks: [], points: rates(points, seconds, now) });
    },
  };
}
