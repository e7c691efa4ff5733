// Everything is readable without this script; it adds choosing a token, filtering and sorting, keys and tooltips.
"use strict";
document.documentElement.classList.add("js");

// The tokens of the probe sentence are one tab stop; arrow keys, Home and End move within.
const tokens = [...document.querySelectorAll(".token")];
function choose(index, focus) {
  tokens.forEach((token, i) => {
    token.setAttribute("aria-pressed", String(i === index));
    token.tabIndex = i === index ? 0 : -1;
    document.getElementById(token.getAttribute("aria-controls")).hidden = i !== index;
  });
  if (focus) tokens[index].focus();
}
tokens.forEach((token, i) => {
  token.addEventListener("click", () => choose(i, false));
  token.addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const target = { ArrowLeft: i - 1, ArrowUp: i - 1, ArrowRight: i + 1, ArrowDown: i + 1, Home: 0, End: last }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    choose(Math.min(last, Math.max(0, target)), true);
  });
});

// The token that changed most says most: it is shown first.
if (tokens.length) {
  const spread = tokens.map((token) => {
    const heights = [...token.querySelectorAll("i")].map((bar) => parseFloat(bar.style.height));
    return Math.max(...heights) - Math.min(...heights);
  });
  choose(spread.indexOf(Math.max(...spread)), false);
}

const list = document.getElementById("sample-list");
if (list) {
  const samples = [...list.children];
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const filter = document.getElementById("filter");
  const sort = document.getElementById("sort");
  function update() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [sign, key] = [sort.value[0] === "-" ? -1 : 1, sort.value.slice(1)];
    // Where there is no difference to sort by, a sample goes last.
    const place = (sample) => (key ? sign * (JSON.parse(sample.dataset.gains)[key] ?? sign * Infinity) : Number(sample.dataset.order));
    samples.map((sample) => [place(sample), sample]).sort((a, b) => (a[0] === b[0] ? 0 : a[0] - b[0])).forEach(([, sample]) => list.append(sample));
    let shown = 0;
    for (const sample of samples) {
      sample.hidden = !words.every((word) => texts.get(sample).includes(word));
      shown += !sample.hidden;
    }
    document.getElementById("shown").textContent = `${shown} shown`;
  }
  filter.addEventListener("input", update);
  sort.addEventListener("change", update);
  filter.form.addEventListener("submit", (event) => event.preventDefault());
}

// j and k go from section to section, t to the top, / to the filter.
const sections = [...document.querySelectorAll("main > section")];
function go(section) {
  if (!section) return;
  section.scrollIntoView();
  section.tabIndex = -1;
  section.focus({ preventScroll: true });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  const edge = (section) => section.getBoundingClientRect().top - 52; // below the bar of links
  if (event.key === "j") go(sections.find((section) => edge(section) > 5));
  else if (event.key === "k") go(sections.findLast((section) => edge(section) < -5));
  else if (event.key === "t") scrollTo(0, 0);
  else if (event.key === "/" && list) document.getElementById("filter").focus();
  else return;
  event.preventDefault();
});

// The title of a mark is its tooltip without a script, late and never on a touch screen; here it comes at once.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip", hidden: true }));
document.querySelectorAll(".chart title").forEach((title) => title.remove());
for (const kind of ["pointerover", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const mark = event.target.closest(".chart [aria-label][role='graphics-symbol']");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.clientY > innerHeight - 60 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 14}px`;
  });
}
addEventListener("scroll", () => (tip.hidden = true), { passive: true });
