// What ranking and writing share: the draft, the time spent, skipping, help, and sending once.
import { go, post, say, typing, warn } from "./page.js";

const IDLE = 120_000; // ms without activity after which time is not counted
const element = document.getElementById("task");
const nonce = element.dataset.nonce;
const saved = document.getElementById("saved");
const submitButton = document.getElementById("submit");
const skipDialog = document.getElementById("skip");
const helpDialog = document.getElementById("help");

export const draft = JSON.parse(element.dataset.draft);

let read; // what is on the page, as the draft keeps it
let seconds = draft.seconds ?? 0;
let lastActivity = Date.now();
let timer;
let busy = false;

for (const kind of ["pointerdown", "keydown", "scroll", "pointermove"]) {
  addEventListener(kind, () => { lastActivity = Date.now(); }, { passive: true, capture: true });
}
setInterval(() => { if (!document.hidden && Date.now() - lastActivity < IDLE) seconds += 1; }, 1000);
// Keeps the lease while the labeler is active.
setInterval(() => { if (!document.hidden && Date.now() - lastActivity < IDLE) save(); }, 60_000);

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

/** Call this after every change. */
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
    // Sending it again stores it only once: the nonce identifies the task.
    warn(error.status === 0 || error.status >= 500
      ? `It is unclear whether this was stored: ${error.message}. Nothing on this page is lost; submit again, it cannot be stored twice.`
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

/** Starts the page: `current` returns what is on it, `keys` maps keys to actions. */
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
    // Enter and arrows keep their meaning on a control, but Enter on an output that is chosen already submits.
    const own = event.target.matches("button, a, summary, input") && !event.target.matches("[aria-pressed=true], #submit");
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
