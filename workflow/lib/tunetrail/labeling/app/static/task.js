// A task on the page, whatever its kind: its draft, its time, skipping, help, and sending it once.
import { go, post, say, typing, warn } from "./page.js";

const IDLE = 120_000; // ms without a sign of the labeler after which time is not counted
const element = document.getElementById("task");
const nonce = element.dataset.nonce;
const saved = document.getElementById("saved");
const submitButton = document.getElementById("submit");
const skipDialog = document.getElementById("skip");
const helpDialog = document.getElementById("help");

export const draft = JSON.parse(element.dataset.draft);

let read; // what is on the page, as the draft keeps it
let seconds = draft.seconds ?? 0;
let sign = Date.now();
let timer;
let busy = false;

for (const kind of ["pointerdown", "keydown", "scroll", "pointermove"]) {
  addEventListener(kind, () => { sign = Date.now(); }, { passive: true, capture: true });
}
setInterval(() => { if (!document.hidden && Date.now() - sign < IDLE) seconds += 1; }, 1000);
// The lease is renewed while somebody is there.
setInterval(() => { if (!document.hidden && Date.now() - sign < IDLE) save(); }, 60_000);

async function save() {
  clearTimeout(timer);
  timer = undefined;
  if (busy) return;
  try {
    await post("draft", { nonce, draft: { ...read(), seconds } });
    if (timer === undefined) saved.textContent = "Draft saved";
  } catch (error) {
    saved.textContent = `Draft not saved: ${error.message}`;
  }
}

/** To be called after every change. */
export function changed() {
  saved.textContent = "";
  clearTimeout(timer);
  timer = setTimeout(save, 700);
}

async function send(path, body) {
  if (busy) return; // a second Enter
  busy = true;
  clearTimeout(timer);
  submitButton.disabled = true;
  say("Sending…");
  try {
    location.assign((await post(path, { nonce, ...body })).next);
  } catch (error) {
    busy = false;
    submitButton.disabled = false;
    say("");
    // Sent again it is stored once: the server knows the task by its nonce.
    warn(error.status === 0 || error.status >= 500
      ? `Not known to be stored: ${error.message}. Nothing is lost on this page; submit again, it cannot be stored twice.`
      : `Not stored: ${error.message}.`);
    if (error.status === 409) element.classList.add("over");
  }
}

export const submit = answer => send("submit", { answer: { ...answer, seconds } });
export const undo = () => go("undo", {});
export const askSkip = () => skipDialog.showModal();
export const askHelp = () => helpDialog.showModal();

export function toggleRaw() {
  for (const part of document.querySelectorAll(".rendered, .raw")) part.hidden = !part.hidden;
}

/** Starts it: `current` gives what is on the page, `keys` maps a key to what it does. */
export function start(current, keys) {
  read = current;
  const actions = { s: askSkip, "?": askHelp, v: toggleRaw, u: undo, ...keys };
  addEventListener("keydown", event => {
    if (document.querySelector("dialog[open]") || event.altKey || event.metaKey) return;
    if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); actions.submit(); return; }
    if (event.ctrlKey || event.isComposing) return;
    if (event.key === "Escape") { document.activeElement.blur(); return; }
    if (typing(event.target)) return;
    const act = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    // Enter and arrows on a control do what they do there.
    const own = event.target.matches("button, a, summary, input") && !event.target.matches("[data-chip], #submit");
    if ((event.key === "Enter" && own) || (event.key.startsWith("Arrow") && event.target.matches("input"))) return;
    event.preventDefault();
    act();
  });
  skipDialog.querySelector("[data-close]").addEventListener("click", () => skipDialog.close("cancel"));
  for (const dialog of [skipDialog, helpDialog]) {
    dialog.addEventListener("close", () => { if (dialog.contains(document.activeElement)) document.activeElement.blur(); });
  }
  skipDialog.addEventListener("close", () => {
    if (skipDialog.returnValue !== "skip") return;
    const reason = skipDialog.querySelector("[name=reason]:checked").value;
    send("skip", { skip: { reason, comment: document.getElementById("skip-comment").value, seconds } });
  });
  document.getElementById("help-open").addEventListener("click", askHelp);
  const comment = document.getElementById("comment");
  comment.value = draft.comment ?? "";
  comment.addEventListener("input", changed);
  addEventListener("pagehide", () => { if (timer !== undefined) save(); });
}
