// Light, dark or as the system says. A classic script in the head: the page is never shown in the wrong colours first.
"use strict";
(() => {
  const KEY = "hiveswarm.theme";
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  let theme = "auto";

  function show(name) {
    theme = themes.includes(name) ? name : "auto";
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
  }

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // a browser that keeps nothing
    }
  }

  show(remembered());
  window.hiveTheme = {
    get name() {
      return theme;
    },
    /** On to the next one: what the system says, light, dark. */
    next() {
      show(themes[(themes.indexOf(theme) + 1) % themes.length]);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // it lasts until the page is left
      }
      root.dispatchEvent(new Event("themechange"));
    },
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    root.dispatchEvent(new Event("themechange")),
  );
})();
