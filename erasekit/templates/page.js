"use strict";
(() => {
  const root = document.documentElement;
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // Colours: the system's, or as chosen; kept where the browser keeps anything for a file.
  const THEMES = ["system", "light", "dark"];
  const kept = {
    get: () => { try { return localStorage.getItem("erasekit-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("erasekit-theme", value); } catch { /* nothing is kept then */ } },
  };
  function paint(theme) {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
  }
  let theme = THEMES.includes(kept.get()) ? kept.get() : "system";
  paint(theme);

  function themes() {
    const button = one("#theme");
    const say = () => { button.textContent = `Theme: ${theme}`; };
    button.hidden = false;
    say();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      paint(theme);
      kept.set(theme);
      say();
    });
  }

  // The divider between base and erased: a range input over both, so that keys and screen readers know it.
  function divider(two, label) {
    const range = document.createElement("input");
    Object.assign(range, { type: "range", className: "wipe", min: 0, max: 100, value: 50 });
    range.setAttribute("aria-label", label);
    range.addEventListener("input", () => place(two, range.value));
    two.append(range);
    place(two, 50);
    return range;
  }
  function place(two, at) {
    two.style.setProperty("--at", `${at}%`);
    const range = one(".wipe", two);
    range.value = at;
    range.setAttribute("aria-valuetext", `${at} % base, ${100 - at} % erased`);
  }

  function gallery() {
    const form = one("#filters"), list = one("#pairs");
    if (!form) return;
    const items = all("li", list);
    for (const item of items) {
      const two = one(".two", item);
      if (all("img", two).length === 2) divider(two, `Base or erased: ${item.dataset.prompt}`);
      const button = document.createElement("button");
      Object.assign(button, { type: "button", className: "open", title: "Enlarge" });
      button.setAttribute("aria-label", `Enlarge: ${item.dataset.prompt}`);
      button.append(one("#enlarge").content.cloneNode(true));
      button.addEventListener("click", () => viewer.show(item, items.filter((other) => !other.hidden)));
      two.append(button);
    }
    function apply() {
      const { set, outcome, text, order, view } = Object.fromEntries(new FormData(form));
      const words = (text || "").toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const item of items) {
        const said = item.dataset.prompt.toLowerCase();
        item.hidden = (set && item.dataset.set !== set) || (outcome && item.dataset.outcome !== outcome)
          || !words.every((word) => said.includes(word));
        shown += !item.hidden;
      }
      list.classList.toggle("wiped", view === "divider");
      one("#all-at").disabled = view !== "divider";
      const by = order === "prompt" ? "index" : "rank";
      if (list.dataset.by !== by) {
        list.dataset.by = by;
        list.append(...items.sort((a, b) => a.dataset[by] - b.dataset[by]));
      }
      one("output", form).textContent = `${shown} of ${items.length} pairs`;
    }
    form.addEventListener("input", (event) => {
      if (event.target.id !== "all-at") return apply();
      for (const item of items) if (one(".wipe", item)) place(one(".two", item), event.target.value);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // One image large: base and erased under the same divider, and on to the next.
  const viewer = {
    items: [], at: 0,
    start() {
      this.dialog = one("#viewer");
      if (!this.dialog) return;
      this.two = one(".two", this.dialog);
      divider(this.two, "Base or erased");
      one("#viewer-close").addEventListener("click", () => this.dialog.close());
      one("#viewer-before").addEventListener("click", () => this.go(-1));
      one("#viewer-after").addEventListener("click", () => this.go(1));
      this.dialog.addEventListener("keydown", (event) => {
        const way = { n: 1, p: -1 }[event.key];
        if (way && !event.ctrlKey && !event.metaKey) this.go(way);
      });
    },
    show(item, items) {
      this.items = items;
      this.at = items.indexOf(item);
      this.draw();
      this.dialog.showModal();
      one(".wipe", this.two).focus();
    },
    go(way) {
      this.at = (this.at + way + this.items.length) % this.items.length;
      this.draw();
    },
    draw() {
      const item = this.items[this.at];
      one("#viewer-title").textContent = item.dataset.prompt;
      one("#viewer-facts").textContent = item.dataset.facts;
      one("#viewer-where").textContent = `${this.at + 1} of ${this.items.length}`;
      for (const side of ["base", "erased"]) {
        const from = one(`.side.${side} img`, item), to = one(`.side.${side} img`, this.two);
        to.hidden = !from;
        to.alt = from ? from.alt : "";
        if (from) to.src = from.src; else to.removeAttribute("src");
        one(`.side.${side} > span`, this.two).textContent = item.dataset[side] || side;
      }
    },
  };

  // Images drawn while training: one step at a time.
  function film() {
    const strip = one("#film");
    if (!strip) return;
    const frames = all("figure", strip);
    const label = document.createElement("label"), range = document.createElement("input");
    Object.assign(range, { type: "range", min: 0, max: frames.length - 1, value: frames.length - 1 });
    const show = () => {
      frames.forEach((frame, index) => { frame.hidden = index !== Number(range.value); });
      range.setAttribute("aria-valuetext", frames[range.value].dataset.step);
    };
    label.append("Training step ", range);
    range.addEventListener("input", show);
    strip.prepend(label);
    show();
  }

  document.addEventListener("DOMContentLoaded", () => {
    themes();
    viewer.start();
    gallery();
    film();
  });
})();
