"use strict";
// What is under the pointer, the finger or the arrow keys in a map of experts.
const tip = document.getElementById("tip");
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const counts = new Intl.NumberFormat("en");

function decoded(data) {
  const bytes = Uint8Array.from(atob(data.codes), one => one.charCodeAt(0));
  return data.width === "32" ? new Uint32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
}

function describe(map, row, column) {
  const { codes, data, columns } = map;
  const line = codes.subarray(row * columns, (row + 1) * columns);
  const missing = data.width === "32" ? 0xFFFFFFFF : 0xFFFF;
  const value = code => data.kind === "error" ? Math.exp(+data.start + code * data.step) : code * data.step;
  const name = `layer ${map.layers[row]}, expert ${column}: `;
  if (line[column] === missing) return name + (data.kind === "moved" ? "no tokens" : "none");
  const known = line.filter(code => code !== missing), own = value(line[column]);
  if (data.kind === "tokens") {
    const fair = known.reduce((sum, code) => sum + code, 0) / known.length;
    return `${name}${counts.format(own)} tokens, ${digits.format(fair ? own / fair : 0)} times the fair share`;
  }
  if (data.kind === "moved") return `${name}${digits.format(100 * own)} % of its tokens go to another expert`;
  const middle = value([...known].sort((one, two) => one - two)[(known.length - 1) >> 1]);
  return `${name}relative error ${digits.format(100 * own)} %, ${digits.format(own / middle)} times the median`;
}

for (const cells of document.querySelectorAll(".cells")) {
  const data = cells.dataset, layers = data.layers.split(",");
  const map = { data, layers, codes: decoded(data), columns: +data.columns };
  const box = cells.querySelector("i"), at = [0, 0];

  function show(row, column) {
    at[0] = Math.max(0, Math.min(layers.length - 1, row));
    at[1] = Math.max(0, Math.min(map.columns - 1, column));
    const place = cells.getBoundingClientRect();
    const height = place.height / layers.length, width = place.width / map.columns;
    box.style.cssText = `display:block;left:${at[1] * width}px;top:${at[0] * height}px;` +
      `width:${width}px;height:${height}px`;
    tip.textContent = describe(map, at[0], at[1]);
    tip.style.display = "block";
    const x = place.left + at[1] * width, y = place.top + at[0] * height;
    tip.style.left = `${Math.max(4, Math.min(innerWidth - tip.offsetWidth - 4, x + 12))}px`;
    tip.style.top = `${y > tip.offsetHeight + 12 ? y - tip.offsetHeight - 8 : y + height + 8}px`;
  }
  function hide() { box.style.display = tip.style.display = "none"; }
  function point(event) {
    const place = cells.getBoundingClientRect();
    show(Math.floor((event.clientY - place.top) / place.height * layers.length),
      Math.floor((event.clientX - place.left) / place.width * map.columns));
  }
  cells.addEventListener("pointermove", point);
  cells.addEventListener("pointerdown", point);
  cells.addEventListener("pointerleave", hide);
  cells.addEventListener("blur", hide);
  cells.addEventListener("focus", () => show(at[0], at[1]));
  cells.addEventListener("keydown", event => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) { event.preventDefault(); show(at[0] + step[0], at[1] + step[1]); }
  });
}
