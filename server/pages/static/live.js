// Keeps the status page fresh. Without it the page is whole, and has a link to reload.
"use strict";

const SECONDS = 5;
const connection = document.getElementById("connection");
const button = document.getElementById("pause");
const known = new Map(); // part -> what the server sent last, so that an open <details> is no change
let paused = false;
let timer = 0;

for (const part of document.querySelectorAll("[data-live]")) known.set(part.id, part.innerHTML);

/** Replaces what changed, and keeps open details, the focus and what is being typed. */
function show(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  for (const part of fresh.querySelectorAll("[data-live]")) {
    const old = document.getElementById(part.id);
    if (!old || known.get(part.id) === part.innerHTML || busy(old)) continue;
    known.set(part.id, part.innerHTML);
    const open = [...old.querySelectorAll("details[open]")].map((each) => each.id);
    const focus = old.contains(document.activeElement) ? place(old, document.activeElement) : -1;
    old.replaceChildren(...part.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    if (focus >= 0) reachable(old)[focus]?.focus({ preventScroll: true });
  }
}

function reachable(part) {
  return [...part.querySelectorAll("a, button, input, summary, [tabindex]")];
}

function place(part, element) {
  return reachable(part).indexOf(element);
}

/** Whether somebody is typing or selecting there. */
function busy(part) {
  const marked = getSelection();
  const active = document.activeElement;
  return (
    (active instanceof HTMLInputElement && part.contains(active)) ||
    (!marked.isCollapsed && part.contains(marked.anchorNode))
  );
}

function say(text) {
  if (connection.textContent !== text) connection.textContent = text;
}

async function refresh() {
  const begun = performance.now();
  if (!document.hidden) {
    try {
      const answer = await fetch("status/live" + location.search, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const text = await answer.text();
      if (!paused) {
        show(text);
        say("");
      }
    } catch {
      say("No answer from the server; what you see is old.");
    }
  }
  next(performance.now() - begun);
}

/** A page that takes the server long is asked for less often. */
function next(took = 0) {
  clearTimeout(timer);
  if (!paused) timer = setTimeout(refresh, Math.max(SECONDS * 1000, 10 * took));
}

button.hidden = false;
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Go on" : "Pause";
  say(paused ? "Paused." : "");
  if (!paused) refresh();
  else clearTimeout(timer);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) {
    clearTimeout(timer);
    refresh();
  }
});
next();
