"use strict";
// Whatever comes from records is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const chosen = new Set(data.chosen);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* A cell is text, or [text, number] where more digits than are shown count. Numbers sort as numbers, missing values last. */
const textOf = (cell) => (Array.isArray(cell) ? cell[0] : cell);
function numberOf(cell) {
  if (Array.isArray(cell)) return cell[1] === null ? NaN : cell[1];
  const found = /^([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf))(?: ±.*)?%?$/i.exec(cell);
  return found ? (/inf/i.test(found[1]) ? (found[1][0] === "-" ? -Infinity : Infinity) : parseFloat(found[1])) : NaN;
}
const isMissing = (cell) => ["", "--", "nan"].includes(textOf(cell));
function compare(a, b) {
  const [x, y] = [numberOf(a), numberOf(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return x < y ? -1 : x > y ? 1 : 0;
  return textOf(a).localeCompare(textOf(b), "en", { numeric: true });
}

/* A table that sorts by a click on a column's name and shows the rows that have all words of its filter. */
function table(head, rows, { best = [], menus = [], onchoose = null } = {}) {
  const body = make("tbody"), count = make("span"), filter = make("input", { type: "search", placeholder: "Filter rows", "aria-label": "Filter rows", oninput: show });
  const isNumeric = head.map((_, column) => rows.every((cells) => isMissing(cells[column]) || !Number.isNaN(numberOf(cells[column]))));
  const items = rows.map((cells, index) => ({ cells, index, best: best[index] || [], text: cells.map(textOf).join("\n").toLowerCase() }));
  let sorted = { column: -1, sign: 1 };
  const selects = menus.map((column) => {
    const values = [...new Set(rows.map((cells) => textOf(cells[column])))].sort((a, b) => compare(a, b));
    const select = make("select", { "aria-label": head[column], onchange: show }, make("option", { value: "" }, `${head[column]}: all`));
    values.forEach((value, place) => select.append(make("option", { value: place + 1 }, value)));
    return { column, select, values };
  });
  const heads = head.map((name, column) => make("th", { scope: "col", class: isNumeric[column] ? "number" : "" }, make("button", { type: "button", onclick: () => sort(column) }, name)));
  function sort(column) {
    sorted = { column, sign: sorted.column === column ? -sorted.sign : 1 };
    heads.forEach((one, place) => (place === column ? one.setAttribute("aria-sort", sorted.sign > 0 ? "ascending" : "descending") : one.removeAttribute("aria-sort")));
    show();
  }
  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = items.filter((item) => words.every((word) => item.text.includes(word)));
    for (const { column, select, values } of selects) if (select.value) shown = shown.filter((item) => textOf(item.cells[column]) === values[select.value - 1]);
    if (sorted.column >= 0) {
      shown.sort((a, b) => {
        const [x, y] = [a.cells[sorted.column], b.cells[sorted.column]];
        return isMissing(x) - isMissing(y) || sorted.sign * compare(x, y);
      });
    }
    count.textContent = `${shown.length} of ${items.length} rows`;
    body.replaceChildren(...shown.map(line));
  }
  function line(item) {
    const cells = item.cells.map((cell, column) => make("td", { class: `${isNumeric[column] ? "number" : ""}${item.best[column] ? " best" : ""}` }, textOf(cell)));
    if (!onchoose) return make("tr", {}, ...cells);
    const box = make("input", { type: "checkbox", "aria-label": "compare", onchange: () => { onchoose(item.index, box.checked); row.classList.toggle("chosen", box.checked); } });
    box.checked = chosen.has(item.index);
    const row = make("tr", { class: box.checked ? "chosen" : "" }, make("td", {}, box), ...cells);
    return row;
  }
  show();
  const top = make("tr", {}, ...(onchoose ? [make("th", {}, " ")] : []), ...heads);
  return make("div", {}, make("div", { class: "tools" }, filter, ...selects.map((one) => one.select), count), make("div", { class: "scroll" }, make("table", {}, make("thead", {}, top), body)));
}

/* Lines over decoder layers. A series is { name, colour, points: [[x, y], ...] }. */
function chart(series, title, logarithmic) {
  const [width, height, left, right, top, bottom] = [1100, 300, 64, 12, 10, 34];
  const drawn = series.map((one) => ({ ...one, points: one.points.filter(([, y]) => Number.isFinite(y) && (!logarithmic || y > 0)) })).filter((one) => one.points.length);
  if (!drawn.length) return make("p", {}, `${title}: nothing to draw`);
  const scale = logarithmic ? Math.log10 : (y) => y;
  const all = drawn.flatMap((one) => one.points), xs = all.map(([x]) => x), ys = all.map(([, y]) => scale(y));
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = logarithmic ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
  if (y1 - y0 < 0.3 && logarithmic) [y0, y1] = [y0 - 0.15, y1 + 0.15];
  const x = (value) => left + ((value - x0) / Math.max(x1 - x0, 1)) * (width - left - right);
  const y = (value) => height - bottom - ((scale(value) - y0) / (y1 - y0)) * (height - top - bottom);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const ticks = [];
  if (logarithmic) for (let power = Math.floor(y0); power <= y1; power++) for (const digit of y1 - y0 > 2.5 ? [1] : [1, 2, 5]) ticks.push(digit * 10 ** power);
  else for (let tenth = 0; tenth <= 10; tenth += 2) ticks.push(tenth / 10);
  for (const tick of ticks.filter((one) => scale(one) >= y0 - 1e-9 && scale(one) <= y1 + 1e-9)) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    picture.append(draw("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, Number(tick.toPrecision(2))));
  }
  const step = Math.max(1, Math.ceil((x1 - x0) / 24));
  for (let tick = x0; tick <= x1; tick += step) picture.append(draw("text", { x: x(tick), y: height - 14, "text-anchor": "middle" }, tick));
  for (const one of drawn) {
    picture.append(draw("polyline", { points: one.points.map(([a, b]) => `${x(a)},${y(b)}`).join(" "), fill: "none", stroke: one.colour, "stroke-width": 2 }));
    for (const [a, b] of one.points) {
      const dot = draw("circle", { cx: x(a), cy: y(b), r: 3.5, fill: one.colour });
      dot.append(draw("title", {}, `${one.name}\nlayer ${a}: ${Number(b.toPrecision(4))}`));
      picture.append(dot);
    }
  }
  return make("div", {}, make("h3", {}, title), picture);
}

/* Mean of a run's figures over the linears of each decoder layer, or those of one name only. */
function byLayer(run, figures, kind) {
  const sums = new Map();
  data.linears[run.linears].forEach((name, place) => {
    const layer = /(?:^|\.)(\d+)\./.exec(name), value = figures[place];
    if (!layer || value === null || (kind && name.split(".").pop() !== kind)) return;
    const [sum, number] = sums.get(+layer[1]) || [0, 0];
    sums.set(+layer[1], [sum + value, number + 1]);
  });
  return [...sums].map(([layer, [sum, number]]) => [layer, sum / number]).sort((a, b) => a[0] - b[0]);
}

function flatten(value, prefix, found) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) for (const [key, inner] of Object.entries(value)) flatten(inner, prefix ? `${prefix}.${key}` : key, found);
  else found.set(prefix, typeof value === "string" ? value : typeof value === "number" ? String(Number(value.toPrecision(6))) : JSON.stringify(value));
  return found;
}

const kinds = make("select", { "aria-label": "linears", onchange: compareRuns }, make("option", { value: "" }, "mean over a layer's linears"));
const layers = make("div"), differences = make("div"), configs = make("div");

function compareRuns() {
  const runs = [...chosen].sort((a, b) => a - b).map((index) => data.details[index]);
  const colour = (place) => data.colours[place % data.colours.length];
  const series = (key) => runs.map((run, place) => ({ name: run.name, colour: colour(place), points: byLayer(run, run[key], kinds.value) }));
  const legend = make("div", { class: "legend" }, ...runs.map((run, place) => {
    const swatch = make("i");
    swatch.style.background = colour(place);
    return make("span", {}, swatch, run.name);
  }));
  layers.replaceChildren(legend, ...(runs.length ? [chart(series("errors"), "Relative error of the outputs, by decoder layer", true), chart(series("sparsities"), "Sparsity, by decoder layer", false)] : [make("p", {}, "No run is checked.")]));
  const flat = runs.map((run) => flatten(run.record, "", new Map()));
  const keys = [...new Set(flat.flatMap((one) => [...one.keys()]))].filter((key) => new Set(flat.map((one) => one.get(key))).size > 1);
  const rows = keys.map((key) => [key, ...flat.map((one) => one.get(key) ?? "--")]);
  differences.replaceChildren(rows.length ? table(["setting or fact", ...runs.map((run) => run.name)], rows) : make("p", {}, runs.length > 1 ? "The checked runs do not differ." : "Check at least two runs."));
  configs.replaceChildren(...runs.map((run) => make("details", {}, make("summary", {}, run.name), make("pre", {}, JSON.stringify(run.record, null, 1)))));
}

byId("summary").textContent = data.summary;
for (const one of data.tables) byId("tables").append(make("h3", {}, one.title), table(one.head, one.rows, { best: one.best }));
for (const one of data.plots) byId("plots").append(make("figure", {}, make("img", { src: one.image, alt: one.title })));
if (!data.plots.length) byId("plots").append(make("p", {}, data.noplots));
byId("runs").append(table(data.runs.head, data.runs.rows, { menus: [0, 1, 2], onchoose: (index, on) => { on ? chosen.add(index) : chosen.delete(index); compareRuns(); } }));
for (const kind of [...new Set(data.linears.flat().map((name) => name.split(".").pop()))].sort()) kinds.append(make("option", { value: kind }, kind));
byId("layers").append(make("div", { class: "tools" }, kinds), layers);
byId("differences").append(differences);
byId("configs").append(configs);
compareRuns();
