// The page: which view is shown, the keyboard, the colours, the key.
//
// A view is a module with `open(main, parameters, context)`, which fills `main` and returns {keys, help}: what single
// keys do there. `context.signal` ends with the view; everything that goes on listens to it.

import * as api from "./api.js";
import { h, show, toast } from "./dom.js";
import * as overview from "./overview.js";
import * as trajectories from "./trajectories.js";
import * as trajectory from "./trajectory.js";

const main = document.getElementById("main");
const pulse = document.getElementById("pulse");

let open = null; // of the current view: {controller, keys, help}

// Views

function route() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const parameters = new URLSearchParams(query);
  const parts = path.split("/").filter(Boolean);
  if (parts[0] === "t" && parts.length > 1) {
    return { name: "trajectories", view: trajectory, path, parameters, id: decoded(parts.slice(1).join("/")) };
  }
  if (parts[0] === "trajectories") return { name: "trajectories", view: trajectories, path, parameters };
  return { name: "overview", view: overview, path: "/", parameters };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

async function render(anew = false) {
  const found = route();
  // A view may write its own state into the address; then it is there already.
  if (anew !== true && open && open.path === found.path && open.changed && open.changed(found.parameters)) return;
  open?.controller.abort();
  const controller = new AbortController();
  const context = { signal: controller.signal, id: found.id };
  open = { controller, path: found.path, keys: {}, help: [] };
  const mine = open;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.dataset.view === found.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.dataset.view = found.name;
  try {
    const opened = await found.view.open(main, found.parameters, context);
    if (open !== mine) return;
    Object.assign(mine, opened);
    // Whoever reads with a screen reader is where the new view begins, not where the old one was.
    if (document.activeElement === document.body) main.focus({ preventScroll: true });
  } catch (error) {
    if (error.name !== "AbortError" && !controller.signal.aborted) failed(error);
  }
}

/** A view that has nothing to show, and will have nothing, says why. What may pass is trouble.js's. */
function failed(error) {
  if (error.status === 401) return;
  const hints = {
    403: "Use a key with the scope trainer: the key button is at the top right.",
    404: "It may have made room for newer ones, or its run was forgotten.",
  };
  if (error.status === undefined) console.error(error);
  show(
    main,
    h("section", { class: "empty" },
      h("h1", {}, error.status === 404 ? "Not here" : "That did not work"),
      h("p", {}, error.message),
      h("p", { class: "faint" }, hints[error.status] || ""),
      h("p", {}, h("button", { type: "button", onclick: () => render(true) }, "Try again"), " ", h("a", { class: "button", href: "#/" }, "Overview"))),
  );
}

/** The word on the cluster in the bar. */
function say(state, text) {
  if (pulse.dataset.state === state && pulse.textContent === text) return;
  pulse.dataset.state = state;
  // A phone has room for the first part.
  const [first, ...rest] = text.split(" · ");
  show(pulse, first, rest.length > 0 && h("span", { class: "wide-only" }, ` · ${rest.join(" · ")}`));
}

// The cluster's state is in the bar whatever is shown.
function watchCluster() {
  const controller = new AbortController();
  api.poll(
    async () => {
      const weights = await api.get("v1/weights", {}, controller.signal);
      // A file that is looked at without a cluster.
      if (weights.file) return say("none", weights.file);
      const replicas = Object.values(weights.replicas);
      const fit = replicas.filter((replica) => replica.health === undefined || replica.health === "healthy").length;
      const engines = fit === replicas.length ? `${fit} engine${fit === 1 ? "" : "s"}` : `${fit} of ${replicas.length} engines`;
      say(fit === 0 ? "bad" : fit < replicas.length ? "part" : "good", `v${weights.version} · ${engines}`);
      keyButton(false);
    },
    4000,
    controller.signal,
    (error) => say("bad", error.status === 403 ? "no access" : error.status === 503 ? "starting" : "no answer"),
  );
  return controller;
}

let cluster = new AbortController();

function begin() {
  cluster.abort();
  cluster = watchCluster();
  render(true);
}

// The key

const keyBox = h("dialog", { class: "box", "aria-labelledby": "key-title" });
document.body.append(keyBox);

function askKey(why = "") {
  keyButton(true);
  if (keyBox.open) return;
  const input = h("input", {
    id: "key-input", type: "password", autocomplete: "off", spellcheck: "false", autocapitalize: "off",
    placeholder: "API key", "aria-describedby": "key-note", required: true,
  });
  const done = (value) => {
    api.setKey(value);
    keyBox.close();
    begin();
  };
  const enter = (event) => {
    event.preventDefault();
    if (input.value.trim()) done(input.value.trim());
  };
  show(
    keyBox,
    h("form", { onsubmit: enter },
      h("h2", { id: "key-title" }, "This cluster asks for a key"),
      h("p", { class: "faint", id: "key-note" },
        why ? `${why[0].toUpperCase()}${why.slice(1)}. ` : "",
        "It needs the scope trainer or admin, stays in this tab and is gone when you close it."),
      h("label", { for: "key-input", class: "hidden" }, "API key"),
      input,
      h("div", { class: "actions" },
        api.key() && h("button", { type: "button", onclick: () => done("") }, "Forget the key"),
        h("button", { type: "button", onclick: () => keyBox.close() }, "Cancel"),
        h("button", { type: "submit", class: "primary" }, "Open"))),
  );
  say("none", "locked");
  if (!main.childElementCount || main.querySelector(".loading, .empty")) {
    show(main, h("section", { class: "empty" }, h("h1", {}, "Locked"), h("p", {}, "The cluster shows nothing without an API key."),
      h("p", {}, h("button", { type: "button", class: "primary", onclick: () => askKey() }, "Enter a key"))));
  }
  keyBox.showModal();
}

function keyButton(needed) {
  document.getElementById("key").hidden = !needed && !api.key();
}

api.whenKeyNeeded((error) => askKey(api.key() ? error.message.split(":")[0] : ""));
document.getElementById("key").addEventListener("click", () => askKey());

// Colours

const THEME_NAMES = { auto: "as the system", light: "light", dark: "dark" };
const themeButton = document.getElementById("theme");

function nameTheme() {
  const name = `Colours: ${THEME_NAMES[window.colours.chosen()] ?? "as the system"}`;
  themeButton.setAttribute("aria-label", name);
  themeButton.title = name;
  return name;
}

function nextTheme() {
  const themes = Object.keys(THEME_NAMES);
  window.colours.choose(themes[(themes.indexOf(window.colours.chosen()) + 1) % themes.length]);
  toast(nameTheme());
}

nameTheme();
themeButton.addEventListener("click", nextTheme);

// Keyboard

const helpBox = h("dialog", { class: "box", "aria-labelledby": "help-title" });
document.body.append(helpBox);

function help() {
  const everywhere = [
    ["g o", "overview"],
    ["g t", "trajectories"],
    ["d", "dark, light, as the system"],
    ["esc", "back"],
    ["?", "this"],
  ];
  const list = (title, rows) => rows.length > 0 && [
    h("h3", {}, title),
    h("dl", { class: "keys" }, rows.map(([keys, what]) => [h("dt", {}, keys.split(" ").map((key) => h("kbd", {}, key))), h("dd", {}, what)])),
  ];
  show(
    helpBox,
    h("h2", { id: "help-title" }, "Keyboard"),
    list("Here", open?.help || []),
    list("Everywhere", everywhere),
    h("div", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: () => helpBox.close() }, "Close")),
  );
  helpBox.showModal();
}

document.getElementById("help").addEventListener("click", help);

let pending = "";

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  const pressed = pending + event.key;
  pending = "";
  if (open?.keys?.[pressed]) {
    // False: it had nothing to do, and the browser may.
    if (open.keys[pressed](event) !== false) event.preventDefault();
    return;
  }
  const general = {
    "?": help,
    d: nextTheme,
    go: () => (location.hash = "#/"),
    gt: () => (location.hash = "#/trajectories"),
    g: () => (pending = "g"),
    "/": () => (location.hash = "#/trajectories?focus=1"),
    Escape: () => (route().name === "overview" ? false : (location.hash = "#/")),
  }[pressed];
  if (general && general() !== false) event.preventDefault();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

for (const box of [keyBox, helpBox]) {
  // A click beside it closes it.
  box.addEventListener("click", (event) => event.target === box && box.close());
}

addEventListener("hashchange", () => render());
keyButton(false);
begin();
