import { changed, draft, start, submit } from "./task.js";
import { warn } from "./page.js";

const text = document.getElementById("text");
const comment = document.getElementById("comment");
const count = document.getElementById("count");
const model = document.getElementById("task").dataset.model;

const current = () => ({ text: text.value, comment: comment.value });

function show() {
  const words = text.value.split(/\s+/).filter(Boolean).length;
  count.textContent = `${words} ${words === 1 ? "word" : "words"}`;
}

function finish() {
  if (text.value.trim() === "") {
    warn("Write an answer first, or skip the task.");
    text.focus();
  } else {
    warn("");
    submit(current());
  }
}

text.value = draft.text ?? model;
text.addEventListener("input", () => { show(); changed(); });
document.getElementById("restore")?.addEventListener("click", () => { text.value = model; show(); changed(); text.focus(); });
document.querySelector("[data-do=submit]").addEventListener("click", finish);
document.querySelector("[data-do=skip]").addEventListener("click", () => document.getElementById("skip").showModal());
start(current, { submit: finish, w: () => text.focus() });
show();
text.focus();
