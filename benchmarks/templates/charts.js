"use strict";
// Marks and lines over two axes, as SVG in the colours of the page. A chart is one stop of the Tab
// key; the arrow keys go from item to item, and the item that is pointed at or focused is described.

const SHAPES = [
  "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
  "M-4.5-4.5H4.5V4.5H-4.5Z",
  "M0-6L5.6 4.2H-5.6Z",
  "M0-6.2L6.2 0L0 6.2L-6.2 0Z",
  "M0 6L5.6-4.2H-5.6Z",
];
const COLOURS = 8;  // classes c0 to c7; with five shapes, forty styles that differ

function element(parent, tag, attributes = {}, text = null) {
  const drawn = parent.namespaceURI === "http://www.w3.org/2000/svg" || tag === "svg";
  const made = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function short(value) {
  const magnitude = Math.abs(value);
  return magnitude >= 1e6 ? `${Number((value / 1e6).toPrecision(3))}M`
    : magnitude >= 100 ? Math.round(value).toLocaleString("en")
      : String(Number(value.toPrecision(3)));
}

// --- scales ---------------------------------------------------------------------------------------

const LEAST_ERROR = 0.1;  // per cent: where a logarithmic axis of errors ends
const FORWARD = {
  linear: value => value,
  names: value => value,
  log: value => Math.log10(value),
  error: value => -Math.log10(Math.max(LEAST_ERROR, 100 - value)),
};

function scaleOf(values, accuracy) {
  const low = Math.min(...values), high = Math.max(...values);
  if (accuracy) return (100 - low) / Math.max(LEAST_ERROR, 100 - high) > 4 ? "error" : "linear";
  return low > 0 && high / low > 3 ? "log" : "linear";
}

function ticks(scale, low, high, most) {
  const within = values => values.filter(value => value >= low && value <= high);
  if (scale === "error") {
    const found = within([0, 50, 70, 80, 90, 93, 95, 96, 97, 98, 98.5, 99, 99.5, 99.8]);
    return found.length <= most ? found : found.filter((_, i) => i % 2 === 0);
  }
  if (scale === "log") {
    const powers = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) powers.push(10 ** e);
    const choices = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9], [1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]];
    const found = choices.map(steps => within(powers.flatMap(p => steps.map(s => s * p))));
    return found.find(values => values.length <= most) ?? found.at(-1).filter((_, i) => i % 2 === 0);
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(s => s * power).find(s => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

// An axis with its ends a little outside of the values, and the place of a value in pixels.
function axis(spec, values, from, to) {
  const forward = FORWARD[spec.scale];
  let low = forward(Math.min(...values)), high = forward(Math.max(...values));
  const room = spec.scale === "names" ? 0.6 : (high - low || 1) * 0.06;
  low -= room;
  high += room;
  const back = place => spec.scale === "log" ? 10 ** place
    : spec.scale === "error" ? 100 - 10 ** -place : place;
  return {
    place: value => from + (forward(value) - low) / (high - low) * (to - from),
    ends: [back(low), back(high)],
  };
}

// --- the chart ------------------------------------------------------------------------------------

// spec: {label, x, y, marks, lines, height, room}
//   x, y: {label, scale, better, names}
//   marks: [{x, y, low, high, name, texts, style, className, named}]
//   lines: [{points, className, style, name, texts, steps}]; those without a name only decorate
// Returns highlight(name or null).
function chart(box, spec) {
  let draw = () => {};
  let width = 0;
  const state = {};
  draw = () => Object.assign(state, drawChart(box, spec, width));
  box.observer?.disconnect();
  box.observer = new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) {
      width = box.clientWidth;
      draw();
    }
  });
  width = box.clientWidth || 720;
  draw();
  box.observer.observe(box);
  return name => state.highlight(name);
}

function drawChart(box, spec, width) {
  box.replaceChildren();
  const names = spec.y.names, narrow = width < 520;
  const left = names ? Math.min(narrow ? 120 : 220, 14 + 6.7 * Math.max(...names.map(n => n.length))) : 46;
  const right = narrow ? 14 : spec.room ?? 18, top = names ? 8 : 30, height = spec.height;
  const bottom = height - 46;
  const frame = element(box, "div"), root = element(frame, "svg", {
    viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": spec.label,
  });
  const points = [...spec.marks.map(m => [m.x, m.y]), ...spec.lines.flatMap(line => line.points)];
  const x = axis(spec.x, points.map(p => p[0]), left, width - right);
  const y = axis(spec.y, points.map(p => p[1]), names ? top : bottom, names ? bottom : top);

  // Axes: names of the vertical one stand above it, where they can be read.
  for (const value of ticks(spec.x.scale, ...x.ends, (width - left) / 62)) {
    const at = x.place(value);
    element(root, "line", { class: value === spec.x.one ? "one" : "grid", x1: at, x2: at, y1: top, y2: bottom });
    element(root, "text", { x: at, y: bottom + 16, "text-anchor": "middle" }, short(value));
  }
  const rows = names ? names.map((_, i) => i) : ticks(spec.y.scale, ...y.ends, (bottom - top) / 34);
  for (const value of rows) {
    const at = y.place(value);
    element(root, "line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at });
    const text = names ? names[value] : short(value), most = Math.floor((left - 8) / 6.6);
    const label = element(root, "text", { x: left - 8, y: at + 4, "text-anchor": "end" },
      text.length > most && names ? `${text.slice(0, most - 1)}…` : text);
    if (names) element(label, "title", {}, text);
  }
  const better = { x: { less: "← better", more: "better →" }, y: { less: "↓ better", more: "↑ better" } };
  const heading = which => `${spec[which].label}  ${better[which][spec[which].better] ?? ""}`.trim();
  element(root, "text", { class: "title", x: width - right, y: height - 6, "text-anchor": "end" }, heading("x"));
  if (!names) element(root, "text", { class: "title", x: 2, y: 14 }, heading("y"));

  const items = [];
  const layer = element(root, "g");
  for (const line of spec.lines) {
    const places = line.points.map(p => [x.place(p[0]), y.place(p[1])]);
    const d = places.map(([px, py], i) => i === 0 ? `M${px} ${py}`
      : line.steps ? `H${px}V${py}` : `L${px} ${py}`).join("");
    const group = line.name ? item(layer, line, items, places) : layer;
    element(group, "path", { class: styleClass(line), d });
    if (line.end) element(layer, "text", { x: places.at(-1)[0], y: places.at(-1)[1] - 5, "text-anchor": "end" }, line.end);
  }
  for (const mark of spec.marks) {
    const at = [x.place(mark.x), y.place(mark.y)];
    const group = item(layer, mark, items, [at]);
    if (mark.low !== undefined) {
      const [y1, y2] = [mark.low, mark.high].map(end => Math.min(bottom, Math.max(top, y.place(end))));
      element(group, "line", { class: `whisker ${styleClass(mark)}`, x1: at[0], x2: at[0], y1, y2 });
    }
    element(group, "path", {
      class: `mark ${styleClass(mark)}`, d: SHAPES[(mark.style ?? 0) % SHAPES.length],
      transform: `translate(${at[0].toFixed(1)} ${at[1].toFixed(1)})`,
    });
  }
  writeNames(root, items, { left, right: width - 2, top: 16, bottom });
  return interact(box, frame, root, layer, items, width);
}

function styleClass(entry) {
  return [entry.className, entry.style === undefined ? "" : `c${entry.style % COLOURS}`].join(" ").trim();
}

function item(layer, entry, items, places) {
  const node = element(layer, "g", {
    class: "item", role: "img", tabindex: "-1", "aria-label": [entry.name, ...entry.texts].join(", "),
    "data-name": entry.name,
  });
  items.push({ entry, node, places });
  return node;
}

// Names beside those items that ask for one, where there is room.
function writeNames(root, items, area) {
  const taken = items.flatMap(({ entry, places }) => entry.points ? []
    : places.map(([px, py]) => [px - 5, py - 5, px + 5, py + 5]));
  for (const { entry, places } of items.filter(i => i.entry.named)) {
    const [px, py] = places.at(-1), wide = 6.4 * entry.name.length;
    const choices = entry.points ? [[px + 6, py + 4]]
      : [[px - 8 - wide, py - 7], [px + 8, py + 4], [px - 8 - wide, py + 4], [px + 8, py - 7], [px + 8, py + 15],
        [px - 8 - wide, py + 15], [px - wide / 2, py - 12], [px - wide / 2, py + 22]];
    for (const [tx, ty] of choices) {
      const place = [tx, ty - 10, tx + wide, ty + 3];
      const outside = place[0] < area.left || place[2] > area.right || place[1] < area.top || place[3] > area.bottom;
      const hit = taken.some(t => place[0] < t[2] && t[0] < place[2] && place[1] < t[3] && t[1] < place[3]);
      if (outside || hit) continue;
      taken.push(place);
      element(root, "text", { class: "name", x: tx, y: ty, "aria-hidden": "true" }, entry.name);
      break;
    }
  }
}

// What is pointed at or focused is described in a box beside it, and drawn above the others.
function interact(box, frame, root, layer, items, width) {
  const tip = element(box, "div", { class: "tip", hidden: "", "aria-hidden": "true" });
  const order = [...items].sort((a, b) => a.places.at(-1)[0] - b.places.at(-1)[0] || a.places.at(-1)[1] - b.places.at(-1)[1]);
  let shown = null;
  function show(next, at = next?.places.at(-1)) {
    shown?.node.classList.remove("on");
    shown = next;
    layer.classList.toggle("some", next !== null);
    tip.hidden = next === null || at === null;
    if (next === null) return;
    next.node.classList.add("on");
    if (document.activeElement !== next.node) layer.append(next.node);
    if (at === null) return;
    tip.replaceChildren();
    element(tip, "b", {}, next.entry.name);
    for (const text of next.entry.texts) element(tip, "span", {}, text);
    const scale = root.clientWidth / width || 1;
    const px = at[0] * scale, py = at[1] * scale;
    tip.style.left = `${Math.max(0, Math.min(px + 14, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${py > tip.offsetHeight + 16 ? py - tip.offsetHeight - 12 : py + 14}px`;
  }
  function focus(next) {
    for (const { node } of items) node.setAttribute("tabindex", "-1");
    next.node.setAttribute("tabindex", "0");
    next.node.focus();
  }
  order[0]?.node.setAttribute("tabindex", "0");
  // On the frame: an SVG element that listens for focus takes the focus itself.
  frame.addEventListener("focusin", event => {
    show(items.find(({ node }) => node === event.target) ?? null);
  });
  frame.addEventListener("focusout", () => show(null));
  frame.addEventListener("keydown", event => {
    const last = order.length - 1, i = order.findIndex(({ node }) => node === document.activeElement);
    const next = {
      ArrowRight: Math.min(last, i + 1), ArrowDown: Math.min(last, i + 1), ArrowLeft: Math.max(0, i - 1),
      ArrowUp: Math.max(0, i - 1), Home: 0, End: last,
    }[event.key];
    if (event.key === "Escape") show(null);
    if (i < 0 || next === undefined) return;
    event.preventDefault();
    focus(order[next]);
  });
  root.addEventListener("pointermove", event => {
    const area = root.getBoundingClientRect(), scale = width / area.width;
    const px = (event.clientX - area.left) * scale, py = (event.clientY - area.top) * scale;
    let nearest = null, best = 22, at = null;
    for (const entry of items)
      for (const place of entry.places) {
        const distance = Math.hypot(place[0] - px, place[1] - py);
        if (distance < best) [nearest, best, at] = [entry, distance, place];
      }
    show(nearest, at ?? undefined);
  });
  root.addEventListener("pointerleave", () => show(null));
  return {
    highlight: name => show(items.find(({ entry }) => entry.name === name) ?? null, null),
  };
}

function legend(list, entries) {
  list.replaceChildren();
  for (const { label, style, className } of entries) {
    const line = element(list, "li");
    const picture = element(line, "svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" });
    element(picture, "path", {
      class: `mark ${styleClass({ style, className })}`, d: SHAPES[(style ?? 0) % SHAPES.length],
    });
    line.append(label);
  }
}
