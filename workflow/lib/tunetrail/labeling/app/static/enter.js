// The token follows the # of the link: browsers do not send that part.
import { post, warn } from "./page.js";

const form = document.getElementById("enter");
const field = document.getElementById("token");

async function enter() {
  try {
    location.replace((await post("enter", { token: field.value })).next);
  } catch (error) {
    warn(`You cannot enter: ${error.message}.`);
    field.select();
  }
}

form.addEventListener("submit", event => { event.preventDefault(); enter(); });
function fromLink() {
  if (location.hash.length < 2) return;
  field.value = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  enter();
}
addEventListener("hashchange", fromLink); // a link pasted while this page is open
field.focus();
fromLink();
