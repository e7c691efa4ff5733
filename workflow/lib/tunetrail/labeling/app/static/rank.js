import { fromRanks, insert, join, move, place, ranks, remove, tie, tieRest } from "./order.js";
import { askSkip, changed, draft, start, submit } from "./task.js";
import { dragging } from "./drag.js";
import { say, warn } from "./page.js";

const cards = [...document.querySelectorAll(".output")];
const K = cards.length;
const letter = output => "ABCDEFGHI"[output];
const tray = document.querySelector(".tray");
const groupsList = document.getElementById("groups");
const unplacedBox = document.getElementById("unplaced");
const allBad = document.getElementById("all-bad");
const comment = document.getElementById("comment");

let order = fromRanks(draft.ranks?.length === K ? draft.ranks : Array(K).fill(null));
let chosen = null;
let past = [];

const ratingOf = card => Number(card.querySelector("[data-rating]:checked")?.value) || null;
const flagsOf = card => [...card.querySelectorAll("[data-flag]:checked")].map(box => box.value);
const current = () => ({
  ranks: ranks(order, K),
  ratings: cards.map(ratingOf),
  flags: cards.map(flagsOf),
  all_bad: allBad.checked,
  comment: comment.value,
});

function describeRank(output) {
  const n = ranks(order, K)[output];
  if (!n) return "not placed";
  const ties = order.groups[n - 1].filter(other => other !== output).map(letter);
  return `rank ${n}${ties.length ? `, tied with ${ties.join(", ")}` : ""}`;
}

// Drawing

function chip(output) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "chip";
  button.dataset.chip = output;
  button.textContent = letter(output);
  button.setAttribute("aria-label", `Output ${letter(output)}, ${describeRank(output)}`);
  button.setAttribute("aria-pressed", output === chosen);
  return button;
}

function gap(n) {
  const item = document.createElement("li");
  item.className = "between";
  item.dataset.drop = `before ${n}`;
  item.setAttribute("aria-hidden", "true");
  return item;
}

function draw() {
  const focused = tray.contains(document.activeElement) && document.activeElement.dataset.chip;
  const items = [gap(0)];
  order.groups.forEach((group, n) => {
    const item = document.createElement("li");
    item.className = "group";
    item.dataset.drop = `group ${n}`;
    const rank = document.createElement("span");
    rank.className = "number";
    rank.textContent = n + 1;
    rank.setAttribute("aria-hidden", "true");
    item.append(rank, ...group.map(chip));
    items.push(item, gap(n + 1));
  });
  groupsList.replaceChildren(...items);
  groupsList.classList.toggle("empty", order.groups.length === 0);
  unplacedBox.replaceChildren(...order.unplaced.map(chip));
  for (const [output, card] of cards.entries()) {
    card.classList.toggle("chosen", output === chosen);
    card.querySelector("[data-rank]").textContent = describeRank(output);
    card.querySelector("[data-rank]").classList.toggle("placed", !order.unplaced.includes(output));
    card.querySelector(".chip").setAttribute("aria-pressed", output === chosen);
    const flags = flagsOf(card);
    card.querySelector(".flagged").textContent = flags.length ? `(${flags.length})` : "";
  }
  document.getElementById("submit").classList.toggle("waiting", order.unplaced.length > 0);
  tray.querySelector("[data-do=rest]").disabled = order.unplaced.length === 0;
  tray.querySelector("[data-do=back]").disabled = past.length === 0;
  for (const button of document.querySelectorAll("#moves button")) button.disabled = chosen === null;
  if (focused !== false && focused !== undefined) tray.querySelector(`[data-chip="${focused}"]`)?.focus();
}

// Actions

function become(next) {
  if (next === order) return;
  past.push(order);
  order = next;
  warn("");
  changed();
  draw();
  if (chosen !== null) say(`${letter(chosen)}: ${describeRank(chosen)}`);
}

function choose(output) {
  chosen = output;
  warn("");
  draw();
  cards[output].querySelector("header").scrollIntoView({ block: "nearest" });
  say(`${letter(output)} chosen, ${describeRank(output)}`);
}

function press(output) {
  choose(output);
  if (order.unplaced.includes(output)) become(place(order, output));
}

const withChosen = act => () => {
  if (chosen === null) warn("Choose an output first: press its letter.");
  else act(chosen);
};

function stepBack() {
  if (!past.length) return;
  order = past.pop();
  changed();
  draw();
  say("Last step undone.");
}

function rate(n) {
  if (chosen === null) { warn("Choose an output first: press its letter."); return; }
  const box = cards[chosen].querySelector(`[data-rating][value="${n}"]`);
  if (!box) return;
  box.checked = !box.checked;
  changed();
  say(`${letter(chosen)}: ${box.checked ? `rated ${n}` : "no rating"}`);
}

function finish() {
  if (order.unplaced.length) {
    warn(`Not placed yet: ${order.unplaced.map(letter).join(", ")}.`);
    return;
  }
  warn("");
  submit(current());
}

const actions = {
  better: withChosen(output => become(move(order, output, -1))),
  worse: withChosen(output => become(move(order, output, 1))),
  tie: withChosen(output => become(tie(order, output))),
  rest: () => become(tieRest(order)),
  back: stepBack,
  skip: askSkip,
  submit: finish,
};
const keys = {
  ArrowLeft: actions.better, ArrowRight: actions.worse, t: actions.tie, "=": actions.tie, r: actions.rest, z: stepBack,
  submit: finish, Enter: finish,
  Backspace: withChosen(output => become(remove(order, output))),
  Delete: withChosen(output => become(remove(order, output))),
  x: () => { allBad.checked = !allBad.checked; changed(); say(allBad.checked ? "All of them are bad." : "Not all are bad."); },
  w: () => comment.focus(),
  m: withChosen(output => {
    const flags = cards[output].querySelector(".flags");
    flags.open = !flags.open;
    (flags.open ? flags.querySelector("input") : cards[output].querySelector(".chip")).focus();
  }),
};
for (const output of cards.keys()) keys[letter(output).toLowerCase()] = () => press(output);
for (let n = 1; n <= 7; n++) keys[n] = () => rate(n);

addEventListener("click", event => {
  const button = event.target.closest?.("[data-chip], [data-do]");
  if (button?.dataset.do) actions[button.dataset.do]();
  else if (button) press(Number(button.dataset.chip));
});
dragging((output, drop) => {
  chosen = output;
  const [where, n] = drop.split(" ");
  if (where === "before") become(insert(order, output, Number(n)));
  else if (where === "group") become(join(order, output, Number(n)));
  else become(remove(order, output));
});

// Restoring the draft

cards.forEach((card, output) => {
  for (const box of card.querySelectorAll("[data-rating]")) {
    box.checked = Number(box.value) === draft.ratings?.[output];
    box.addEventListener("change", changed);
  }
  for (const box of card.querySelectorAll("[data-flag]")) {
    box.checked = draft.flags?.[output]?.includes(box.value) ?? false;
    box.addEventListener("change", () => { changed(); draw(); });
  }
  card.addEventListener("focusin", () => {
    if (chosen !== output) { chosen = output; draw(); }
  });
});
allBad.checked = draft.all_bad ?? false;
allBad.addEventListener("change", changed);
start(current, keys);
draw();
