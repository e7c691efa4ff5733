// The token comes behind the # of the link: browsers send that part to nobody.
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
if (location.hash.length > 1) {
  field.value = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  enter();
} else {
  field.focus();
}
