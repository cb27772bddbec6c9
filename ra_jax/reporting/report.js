"use strict";
// Charts: pointing at one chart shows the values of all charts at that step.
const data = JSON.parse(document.getElementById("curves").textContent);
const panels = [...document.querySelectorAll(".panel")].map((figure, i) => {
  const svg = figure.querySelector("svg"), slots = [...figure.querySelectorAll(".legend b")];
  const markers = data[i].stacked ? [] : data[i].values.map((_, k) => {
    const marker = document.createElementNS(svg.namespaceURI, "circle");
    marker.setAttribute("class", `spot s${k % 6}`);
    marker.setAttribute("r", 0);
    return svg.appendChild(marker);
  });
  return { ...data[i], svg, slots, markers, at: figure.querySelector(".at"), last: slots.map((slot) => slot.innerHTML) };
});

function toPixels([low, high, start, end, log], value) {
  const f = log ? Math.log : (x) => x;
  return start + ((end - start) * (f(value) - f(low))) / (f(high) - f(low));
}

function nearest(steps, step) {
  let best = 0;
  steps.forEach((candidate, i) => { if (Math.abs(candidate - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

function formatValue(value) {
  const small = value !== 0 && Math.abs(value) < 1e-3, digits = Number(value.toPrecision(4));
  return (small ? digits.toExponential() : String(digits)).replace(/-/g, "−").replace("e+", "e");
}

function show(step) {
  for (const panel of panels) {
    const i = nearest(panel.steps, step), x = toPixels(panel.x, panel.steps[i]);
    const cursor = panel.svg.querySelector(".cursor");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    panel.svg.classList.add("on");
    panel.at.textContent = `step ${panel.steps[i]}`;
    panel.values.forEach((values, k) => {
      const value = values[i];
      panel.slots[k].textContent = value === null ? "–" : formatValue(value);
      if (!panel.markers[k]) return;
      panel.markers[k].setAttribute("r", value === null ? 0 : 4);
      if (value === null) return;
      panel.markers[k].setAttribute("cx", x);
      panel.markers[k].setAttribute("cy", toPixels(panel.y, value));
    });
  }
}

function hide() {
  for (const panel of panels) {
    panel.svg.classList.remove("on");
    panel.at.textContent = "";
    panel.slots.forEach((slot, k) => { slot.innerHTML = panel.last[k]; });
    panel.markers.forEach((marker) => marker.setAttribute("r", 0));
  }
}

for (const panel of panels) {
  const { svg, steps } = panel, [low, high, start, end] = panel.x;
  let current = steps.length - 1;
  const point = (event) => {
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    current = nearest(steps, low + ((high - low) * (x - start)) / (end - start));
    show(steps[current]);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    current = Math.min(steps.length - 1, Math.max(0, current + move));
    show(steps[current]);
  });
}
document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".panel")) hide(); });

// Previews: a click enlarges an image. Arrow keys, or taps on its left or right half, show other steps of the scene.
const viewer = document.getElementById("viewer");
let opened = null;

function enlarge(button) {
  opened = button;
  const from = button.querySelector("img"), to = viewer.querySelector("img");
  to.src = from.src;
  to.alt = viewer.querySelector("figcaption").textContent = from.alt;
  if (!viewer.open) viewer.showModal();
}

function showNeighbor(direction) {
  const row = [...opened.closest("tr").querySelectorAll(".picture")];
  const next = row[row.indexOf(opened) + direction];
  if (next) enlarge(next);
}

document.querySelectorAll(".picture").forEach((button) => button.addEventListener("click", () => enlarge(button)));
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") showNeighbor(-1);
  if (event.key === "ArrowRight") showNeighbor(1);
});
viewer.addEventListener("click", (event) => {
  if (event.target.tagName !== "IMG") return viewer.close();
  const box = event.target.getBoundingClientRect();
  showNeighbor(event.clientX < box.left + box.width / 2 ? -1 : 1);
});
