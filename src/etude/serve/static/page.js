"use strict";
// Everything works without this file; with it search answers while one types, runs are live, and code can be copied.

const search = document.querySelector("form.search");
if (search) {
  const field = search.elements.q;
  const results = document.getElementById(search.dataset.results);
  let asked = null;
  let waiting = 0;

  const address = (fragment) => {
    const given = new URLSearchParams();
    for (const [name, value] of new FormData(search)) if (value) given.set(name, value);
    if (fragment) given.set("fragment", "1");
    const text = given.toString();
    return "/papers" + (text ? "?" + text : "");
  };
  const ask = async () => {
    if (asked) asked.abort();
    asked = new AbortController();
    results.classList.add("busy");
    try {
      const answer = await fetch(address(true), { signal: asked.signal });
      if (!answer.ok) throw new Error(String(answer.status));
      const text = await answer.text();
      const held = results.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      results.innerHTML = text;
      if (held) (results.querySelector(`a[href="${CSS.escape(held)}"]`) || field).focus();
      history.replaceState(null, "", address(false));
      results.classList.remove("busy");
    } catch (error) {
      if (error.name !== "AbortError") {
        results.classList.remove("busy");
        location.assign(address(false));
      }
    }
  };
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 80);
  });
  search.addEventListener("change", ask);
  search.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    ask();
  });
  search.querySelector("button[type=submit]").hidden = true;
  search.querySelector(".scripted").hidden = false;

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const links = [...results.querySelectorAll(".papers a")];
    const place = links.indexOf(document.activeElement);
    if (event.key === "/" && document.activeElement !== field) {
      event.preventDefault();
      field.focus();
      field.select();
    } else if (event.key === "ArrowDown" && (document.activeElement === field || place >= 0) && links.length) {
      event.preventDefault();
      links[Math.min(place + 1, links.length - 1)].focus();
    } else if (event.key === "ArrowUp" && place >= 0) {
      event.preventDefault();
      (place ? links[place - 1] : field).focus();
    }
  });
}

for (const button of document.querySelectorAll("button.copy")) {
  const text = document.getElementById(button.dataset.copy);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

const live = document.getElementById("live");
if (live) {
  const look = async () => {
    const state = live.firstElementChild && live.firstElementChild.dataset.state;
    if (state !== "running") return;
    try {
      const answer = await fetch(live.dataset.live);
      if (answer.ok) {
        const open = [...live.querySelectorAll("details")].map((one) => one.open);
        live.innerHTML = await answer.text();
        live.querySelectorAll("details").forEach((one, place) => { if (place in open) one.open = open[place]; });
      }
    } catch { /* the server is away; it is asked again */ }
    setTimeout(look, 1000);
  };
  setTimeout(look, 1000);
}
