// Keeps the page up to date: /events says that there is news, the page is fetched again, and the parts that changed
// are put in place. Without scripts the page reloads itself now and then.
"use strict";

const pulse = document.getElementById("pulse");
let revision = Number(document.body.dataset.revision);
let wanted = revision;
let isFetching = false;

function ago(seconds) {
  if (seconds < 1.5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

function tick() {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const text = ago(Date.now() / 1000 - Number(time.dataset.ago));
    if (time.textContent !== text) time.textContent = text;
  }
}

function replace(page) {
  const main = document.getElementById("main");
  const fresh = page.getElementById("main");
  if (main.dataset.shape !== fresh.dataset.shape) {
    main.replaceWith(fresh);
  }
  for (const part of page.querySelectorAll("[data-live]")) {
    const old = document.getElementById(part.id);
    if (old !== null && old.innerHTML !== part.innerHTML) old.innerHTML = part.innerHTML;
  }
  const old = document.querySelector("header time");
  old.dataset.ago = page.querySelector("header time").dataset.ago;
  revision = Number(page.body.dataset.revision);
  tick();
}

async function refresh() {
  if (isFetching) return;
  isFetching = true;
  try {
    for (let seen = revision; wanted !== revision; seen = revision) {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (answer.ok) replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      if (revision === seen) break;
    }
  } catch {
    // the event source notices, too, and tries again
  } finally {
    isFetching = false;
  }
}

const events = new EventSource("events");
events.addEventListener("open", () => {
  document.body.classList.add("is-live");
  pulse.textContent = "live, as of";
});
events.addEventListener("message", (event) => {
  wanted = Number(event.data);
  refresh();
});
events.addEventListener("error", () => {
  document.body.classList.remove("is-live");
  pulse.textContent = "connection lost, as of";
});

tick();
setInterval(tick, 1000);
