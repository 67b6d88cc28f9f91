// Colours, chosen before the first paint, so that a dark page never flashes white. What is chosen is "auto", "light" or
// "dark"; the page's data-theme is what that means at this moment, and styles know no other question.
window.colours = (() => {
  const KEY = "rollout-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "auto";
  try {
    chosen = localStorage.getItem(KEY) || "auto";
  } catch {
    // Storage may be forbidden; then the system decides.
  }

  function apply() {
    const dark = chosen === "dark" || (chosen !== "light" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.dispatchEvent(new Event("themechange"));
  }

  apply();
  system.addEventListener("change", apply);
  return {
    chosen: () => chosen,
    choose(value) {
      chosen = value;
      try {
        localStorage.setItem(KEY, value);
      } catch {
        // It holds for this page, then.
      }
      apply();
    },
  };
})();
