// Everything is readable without this script; it adds choosing a token, filtering and sorting.
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
