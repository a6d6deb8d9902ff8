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

  // Pairs (list items with a divider each) or rows of a comparison: what is shown of them, and in which order.
  function gallery(section) {
    const form = one("form", section), list = one(".items", section), items = [...list.children];
    const pairs = list.classList.contains("pairs");
    if (pairs) items.forEach((item) => furnish(item, items)); else items.forEach((row) => press(row, items));
    function apply() {
      const { set, outcome, text, order, view } = Object.fromEntries(new FormData(form));
      const words = (text || "").toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const item of items) {
        const said = item.dataset.prompt.toLowerCase();
        item.hidden = Boolean((set && item.dataset.set !== set) || (outcome && item.dataset.outcome !== outcome)
          || !words.every((word) => said.includes(word)));
        shown += !item.hidden;
      }
      one("output", form).textContent = `${shown} of ${items.length} ${pairs ? "pairs" : "prompts"}`;
      if (!pairs) return;
      list.classList.toggle("wiped", view === "divider");
      one(".all-at", form).disabled = view !== "divider";
      const by = order === "prompt" ? "index" : "rank";
      if (list.dataset.by !== by) {
        list.dataset.by = by;
        list.append(...items.sort((a, b) => a.dataset[by] - b.dataset[by]));
      }
    }
    form.addEventListener("input", (event) => {
      if (!event.target.classList.contains("all-at")) return apply();
      for (const item of items) if (one(".wipe", item)) place(one(".two", item), event.target.value);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }
  function furnish(item, items) {
    const two = one(".two", item), { prompt, facts } = item.dataset;
    if (all("img", two).length === 2) divider(two, `Base or erased: ${prompt}`);
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "open", title: "Enlarge" });
    button.setAttribute("aria-label", `Enlarge: ${prompt}`);
    button.append(one("#enlarge").content.cloneNode(true));
    item.large = [{ prompt, facts, name: "erased", base: one(".base img", two), erased: one(".erased img", two) }];
    button.addEventListener("click", () => viewer.show(item.large[0], items));
    two.append(button);
  }
  function press(row, rows) {
    const base = one(".base img", row), { prompt } = row.dataset;
    row.large = all(".shot", row).map((button) => {
      const { facts, erased } = button.dataset;
      const entry = { prompt, facts, name: erased, base, erased: one("img", button) };
      button.addEventListener("click", () => viewer.show(entry, rows));
      return entry;
    });
  }

  // One image large: base and erased under the same divider, and on to the next.
  const viewer = {
    entries: [], at: 0,
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
    show(entry, items) {
      this.entries = items.filter((item) => !item.hidden).flatMap((item) => item.large);
      this.at = this.entries.indexOf(entry);
      this.draw();
      this.dialog.showModal();
      one(".wipe", this.two).focus();
    },
    go(way) {
      this.at = (this.at + way + this.entries.length) % this.entries.length;
      this.draw();
    },
    draw() {
      const entry = this.entries[this.at];
      one("#viewer-title").textContent = entry.prompt;
      one("#viewer-facts").textContent = entry.facts;
      one("#viewer-where").textContent = `${this.at + 1} of ${this.entries.length}`;
      one(".erased > span", this.two).textContent = entry.name;
      for (const side of ["base", "erased"]) {
        const from = entry[side], to = one(`.${side} img`, this.two);
        to.hidden = !from;
        to.alt = `${side === "base" ? "base" : entry.name}: ${entry.prompt}`;
        if (from) to.src = from.src; else to.removeAttribute("src");
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
    all(".gallery").forEach(gallery);
    film();
  });
})();
