// Chosen before the first paint, so that a dark page never flashes white. "auto" leaves it to the system.
(() => {
  let theme = "auto";
  try {
    theme = localStorage.getItem("rollout-theme") || "auto";
  } catch {
    // Storage may be forbidden; then the system decides.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
