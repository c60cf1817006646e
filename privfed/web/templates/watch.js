"use strict";
// The server sends pieces of the page, made and escaped there; each takes its place when it changes.
const lost = document.getElementById("lost");
const events = new EventSource("events");

function place(event) {
  const fresh = document.createElement("template");
  fresh.innerHTML = event.data;
  document.getElementById(event.type).replaceChildren(fresh.content);
  const titled = document.querySelector("[data-title]");
  if (titled) document.title = titled.dataset.title;
}

for (const part of ["said", "standing", "charts", "faults", "sites", "rounds"]) events.addEventListener(part, place);
events.onopen = () => { lost.hidden = true; };
events.onerror = () => { lost.hidden = false; };
