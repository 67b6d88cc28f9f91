// The cluster's API: with a key where one is needed, streams through fetch so that they carry it too.

const KEY = "rollout-key";
// The pause between two tries while nobody answers grows to this.
const LONGEST_PAUSE = 10000;
// The page is at …/ui/; the API is beside it, also where a proxy has put a prefix before both.
const BASE = new URL("../", location.href.split(/[?#]/)[0]);

let onKeyNeeded = () => {};

export class ApiError extends Error {
  constructor(status, kind, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** `tell(error)` is called when the cluster wants a key, or another one. */
export function whenKeyNeeded(tell) {
  onKeyNeeded = tell;
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** JSON of a path such as "v1/runs". Parameters that are null or empty are left out; lists are repeated. */
export async function get(path, parameters = {}, signal = undefined) {
  const response = await request(path, parameters, signal);
  return response.json();
}

export const byId = (id, parameters, signal) => get("v1/trajectories/by-id", { id, ...parameters }, signal);
export const ofRun = (run, rest) => (run ? `v1/runs/${encodeURIComponent(run)}/${rest}` : `v1/${rest}`);

async function request(path, parameters, signal, headers = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(parameters)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") url.searchParams.append(name, item);
    }
  }
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(url, { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new ApiError(0, "unreachable", "The cluster does not answer.");
  }
  if (response.ok) return response;
  const failure = await told(response);
  if (response.status === 401) onKeyNeeded(failure);
  throw failure;
}

async function told(response) {
  let error = {};
  try {
    error = (await response.json()).error || {};
  } catch {
    // Not from us: a proxy's page.
  }
  const after = Number(response.headers.get("retry-after")) || null;
  return new ApiError(response.status, error.type || "http", error.message || `HTTP ${response.status}`, after);
}

/** Server-sent events until `[DONE]` or the end: `hear(data, event)` for each. Throws ApiError. */
export async function stream(path, hear, signal) {
  const response = await request(path, {}, signal, { accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const lines = piece.split("\n");
      const field = (name) => lines.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2));
      const data = field("data").join("\n");
      if (data === "[DONE]") {
        reader.cancel().catch(() => {});
        return;
      }
      if (data) hear(JSON.parse(data), field("event")[0] || "message");
    }
  }
}

/** The milliseconds to wait after a failure. */
function longer(pause, milliseconds, error) {
  const wanted = (error.retryAfter || 0) * 1000;
  // "Not ready" is an answer, and a cheap one: who asks as often as ever sees at once that it is.
  if (error.status === 503) return Math.max(milliseconds, Math.min(wanted, LONGEST_PAUSE));
  return Math.max(milliseconds, Math.min(LONGEST_PAUSE, Math.max(pause * 2, wanted)));
}

/**
 * Do something now and every so many milliseconds, while the page is looked at and `signal` says nothing.
 * After a failure it is tried less and less often, at most every 10 s; `failed(error)` hears of each.
 */
export function poll(work, milliseconds, signal, failed = () => {}) {
  let pause = milliseconds;
  let timer = 0;
  let busy = false;
  const round = async () => {
    clearTimeout(timer);
    if (signal.aborted || document.hidden || busy) return;
    busy = true;
    try {
      await work();
      pause = milliseconds;
    } catch (error) {
      // Without a key nothing can be had; the page begins anew when one is given.
      if (signal.aborted || error.status === 401) return;
      // Where another call took this one's place, nothing has failed.
      if (error.name !== "AbortError") {
        pause = longer(pause, milliseconds, error);
        failed(error);
      }
    } finally {
      busy = false;
    }
    if (!signal.aborted) timer = setTimeout(round, pause);
  };
  const seen = () => !document.hidden && round();
  document.addEventListener("visibilitychange", seen, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer), { once: true });
  round();
}

/**
 * What `work` gives, once it succeeds: a cluster that is not there yet is asked again every so many milliseconds, and
 * `failed(error)` hears of each try. Throws what cannot pass: a wrong key, no such thing, a refusal, the signal's end.
 */
export async function patiently(work, milliseconds, signal, failed) {
  let pause = milliseconds;
  for (;;) {
    try {
      return await work();
    } catch (error) {
      const passes = error.status === 0 || error.status === 429 || error.status >= 500;
      if (!passes || signal.aborted) throw error;
      pause = longer(pause, milliseconds, error);
      failed(error);
    }
    await new Promise((done) => setTimeout(done, pause));
    signal.throwIfAborted();
  }
}
