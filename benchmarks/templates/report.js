// --- controls -------------------------------------------------------------------------------------

const DATA = JSON.parse(document.getElementById("data").textContent);

// A control with its label above it.
function labelled(parent, label, tag, attributes = {}, wide = false) {
  const frame = element(parent, "div", { class: wide ? "control wide" : "control" });
  const id = `control-${labelled.count = (labelled.count ?? 0) + 1}`;
  element(frame, "label", { for: id }, label);
  return element(frame, tag, { id, ...attributes });
}

// Choices are [value, label] pairs.
function select(parent, label, choices, change, wide = false) {
  const control = labelled(parent, label, "select", {}, wide);
  fill(control, choices);
  control.addEventListener("change", change);
  return control;
}

function fill(control, choices) {
  const before = control.value;
  control.replaceChildren();
  for (const [value, label] of choices) element(control, "option", { value }, label);
  if (choices.some(([value]) => String(value) === before)) control.value = before;
}

// --- accuracy and cost ----------------------------------------------------------------------------

function isBetter(axis, a, b) {
  return DATA.axes[axis].better === "more" ? a > b : a < b;
}

// Indices of the points that no other is at least as good as in both.
function front(points, xAxis, yAxis) {
  const order = points.map((_, i) => i).sort((i, j) => {
    const [a, b] = [points[i], points[j]];
    if (a.x !== b.x) return isBetter(xAxis, a.x, b.x) ? -1 : 1;
    return a.y === b.y ? 0 : isBetter(yAxis, a.y, b.y) ? -1 : 1;
  });
  const kept = [];
  for (const i of order)
    if (!kept.length || isBetter(yAxis, points[i].y, points[kept.at(-1)].y)) kept.push(i);
  return kept;
}

function scatter() {
  const controls = document.getElementById("scatter-controls");
  if (!controls) return;
  const sets = DATA.sets, tables = document.querySelectorAll("details.set");
  const which = select(controls, "Points", sets.map((set, i) => [i, set.title]), changeSet, true);
  const x = select(controls, "Horizontal axis", [], draw);
  const y = select(controls, "Vertical axis", [], draw);
  const colour = select(controls, "Colour by", [], draw);
  changeSet();

  function changeSet() {
    const set = sets[which.value];
    const choices = set.axes.map(key => [key, DATA.axes[key].label]);
    fill(x, choices);
    fill(y, choices);
    fill(colour, set.colours.map(key => [key, key]));
    colour.parentElement.hidden = !set.colours.length;
    if (x.value === y.value || !scatter.chosen) {
      x.value = set.axes.find(key => key !== "accuracy");
      y.value = set.axes.includes("accuracy") ? "accuracy" : set.axes.findLast(key => key !== x.value);
    }
    scatter.chosen = true;
    tables.forEach((table, i) => { table.hidden = i !== Number(which.value); });
    draw();
  }

  function draw() {
    const set = sets[which.value], key = colour.value;
    const shown = set.points.filter(p => x.value in p.values && y.value in p.values)
      .map(p => ({ ...p, x: p.values[x.value], y: p.values[y.value] }));
    const kept = x.value === y.value ? [] : front(shown, x.value, y.value);
    const groups = [...new Set(shown.map(p => p.groups[key] ?? ""))].sort();
    const scale = (axis, values) => ({
      label: DATA.axes[axis].label, better: DATA.axes[axis].better, scale: scaleOf(values, axis === "accuracy"),
    });
    const spec = {
      label: `Scatter of ${shown.length} points. Arrow keys go from point to point.`,
      x: scale(x.value, shown.map(p => p.x)), y: scale(y.value, shown.map(p => p.y)), height: 480,
      marks: shown.map((p, i) => ({
        x: p.x, y: p.y, name: p.name, className: p.peer ? "hollow" : "", style: groups.indexOf(p.groups[key] ?? ""), named: kept.includes(i),
        ...(p.margin !== null && y.value === "accuracy" ? { low: p.y - p.margin, high: Math.min(100, p.y + p.margin) } : {}),
        texts: describe(p, set),
      })),
      lines: [{ points: kept.map(i => [shown[i].x, shown[i].y]), className: "front", steps: true }],
    };
    if (!kept.length) spec.lines = [];
    chart(document.getElementById("scatter"), spec);
    legend(document.getElementById("scatter-legend"), key ? groups.map((label, style) => ({ label, style })) : []);
    const used = [x.value, y.value], remarks = [];
    if (kept.length) remarks.push(`On the front: ${kept.map(i => shown[i].name).join(", ")}.`);
    if (shown.some(p => p.peer)) remarks.push("Hollow marks are peers' code.");
    if (used.includes("accuracy")) remarks.push(`Accuracy: ${set.accuracy}.`);
    if (used.some(axis => axis.includes("memory"))) remarks.push(`Memory: ${set.memory}.`);
    if (spec.y.scale === "error" || spec.x.scale === "error") remarks.push("The axis of accuracy is logarithmic in the error.");
    const missing = set.points.length - shown.length;
    if (missing) remarks.push(`${missing} of ${set.points.length} points lack a value on one of the axes.`);
    document.getElementById("scatter-caption").textContent = remarks.join(" ");
  }

  function describe(p, set) {
    const values = set.axes.filter(key => key in p.values).map(key =>
      `${DATA.axes[key].label}: ${key === "accuracy" ? p.values[key].toFixed(2) : short(p.values[key])}`
      + (key === "accuracy" && p.margin !== null ? ` ± ${p.margin.toFixed(2)}` : ""));
    return [...Object.entries(p.groups).map(([key, value]) => `${key}: ${value}`), p.note, ...values];
  }
}

// --- beside peers ---------------------------------------------------------------------------------

function strips() {
  const box = document.getElementById("strips");
  if (!box) return;
  const classes = { faster: "faster", slower: "slower", "within the spread": "within hollow" };
  for (const [kind, entries] of Object.entries(DATA.comparisons)) {
    const figure = element(box, "figure");
    element(figure, "h3", {}, `${kind[0].toUpperCase()}${kind.slice(1)}s: our time over the best peer's`);
    const best = name => Math.min(...entries.filter(e => e.name === name).map(e => e.ratio));
    const names = [...new Set(entries.map(e => e.name))].sort((a, b) => best(a) - best(b));
    chart(element(figure, "div", { class: "chart" }), {
      label: `${entries.length} ratios. Arrow keys go from mark to mark.`,
      x: { label: "our time / peer's", better: "less", scale: "log", one: 1 },
      y: { label: "", scale: "names", names },
      height: 60 + 21 * names.length,
      // The line at 1 needs its tick: a range of ratios holds it always.
      lines: [{ points: [[1, 0], [1, names.length - 1]], className: "one" }],
      marks: entries.map(e => ({
        x: e.ratio, y: names.indexOf(e.name), name: e.name, className: `${classes[e.verdict]} faint`,
        texts: [e.setting, e.verdict === "within the spread" ? `within the spread of ${e.peer}`
          : `${e.verdict} than ${e.peer}: ${short(e.ratio)} of its time`],
      })),
    });
    legend(element(figure, "ul", { class: "legend" }), Object.entries(classes).map(([label, className]) => ({ label, className })));
  }
}

// --- growth ---------------------------------------------------------------------------------------

function growth() {
  const controls = document.getElementById("growth-controls");
  if (!controls) return;
  const tables = document.querySelectorAll(".panel");
  const which = select(controls, "Measured", DATA.panels.map((panel, i) => [i, `${panel.title}, by ${panel.size}`]), draw, true);
  controls.hidden = DATA.panels.length < 2;
  draw();

  function draw() {
    const panel = DATA.panels[which.value];
    const groups = [...new Set(panel.curves.map(c => c.group))].sort();
    const sizes = panel.curves.flatMap(c => c.points.map(p => p[0]));
    const low = Math.min(...sizes), high = Math.max(...sizes);
    // Slopes to compare with, above the curves.
    const start = 1.5 * Math.max(...panel.curves.map(c => c.points[0][1]));
    const limit = 1.5 * Math.max(...panel.curves.flatMap(c => c.points.map(p => p[1])));
    const slopes = [1, 2].map(power => {
      const end = Math.min(high, low * (limit / start) ** (1 / power));
      return {
        points: [[low, start], [end, start * (end / low) ** power]], className: "slope", end: `exponent ${power}`,
      };
    });
    const highlight = chart(document.getElementById("curves"), {
      label: `${panel.curves.length} curves. Arrow keys go from curve to curve.`,
      x: { label: panel.size, scale: "log" }, y: { label: "median, ms", scale: "log", better: "less" },
      height: 540, room: 130, marks: [],
      lines: [...slopes, ...[...panel.curves].sort((a, b) => a.points.at(-1)[1] - b.points.at(-1)[1]).map(c => ({
        points: c.points, className: "curve", style: groups.indexOf(c.group), name: c.name, named: true,
        texts: [c.group, `exponent ${c.exponent}`,
          `${short(c.points[0][1])} ms at ${short(c.points[0][0])} ${panel.size}`,
          `${short(c.points.at(-1)[1])} ms at ${short(c.points.at(-1)[0])} ${panel.size}`],
      }))],
    });
    legend(document.getElementById("curves-legend"), groups.map((label, style) => ({ label, style })));
    tables.forEach((table, i) => {
      table.hidden = i !== Number(which.value);
      if (table.hidden) return;
      table.onpointerover = event => highlight(event.target.closest("tbody tr")?.querySelector("th").textContent ?? null);
      table.onpointerleave = () => highlight(null);
    });
  }
}

// --- tables ---------------------------------------------------------------------------------------

const COLLATOR = new Intl.Collator("en", { numeric: true });

function cellText(row, index) {
  return row.cells[index].textContent.trim();
}

// Sorted by a column; empty cells stand last in either direction.
function sort(table, index, direction) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const numeric = headings[index].classList.contains("number");
  const keyed = [...body.rows].map(row => {
    const text = cellText(row, index);
    return { row, empty: text === "", key: numeric ? parseFloat(text.replace(/^[^\d.-]+/, "")) : text };
  });
  const sign = direction === "ascending" ? 1 : -1;
  keyed.sort((a, b) => a.empty - b.empty
    || sign * (numeric ? a.key - b.key : COLLATOR.compare(a.key, b.key)));
  body.append(...keyed.map(({ row }) => row));
  headings.forEach((heading, i) => heading.setAttribute("aria-sort", i === index ? direction : "none"));
}

function enhance(frame) {
  const table = frame.querySelector("table"), rows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, index) => {
    heading.querySelector("button").addEventListener("click", () =>
      sort(table, index, heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending"));
  });
  if (rows.length < 9) return;
  const filters = element(frame, "div", { class: "filters", role: "group", "aria-label": `Filters: ${table.caption.textContent}` });
  const count = element(frame, "p", { class: "count", role: "status" });
  frame.prepend(filters, count);
  const chosen = [];
  headings.forEach((heading, index) => {
    const values = heading.dataset.filter === undefined ? [] : [...new Set(rows.map(row => cellText(row, index)))];
    if (values.length < 2) return;
    values.sort(COLLATOR.compare);
    const label = heading.textContent.trim();
    const control = select(filters, label, [["*", "all"], ...values.map(v => [`=${v}`, v || "(none)"])], apply);
    chosen.push({ index, label, control });
  });
  const search = labelled(filters, "text", "input", { type: "search", placeholder: "any column" });
  let typed;
  search.addEventListener("input", () => {  // thousands of rows are laid out anew: not at every key
    clearTimeout(typed);
    typed = setTimeout(apply, 150);
  });
  element(filters, "button", { type: "button" }, "Show all").addEventListener("click", () => {
    chosen.forEach(({ control }) => { control.value = "*"; });
    search.value = "";
    apply();
  });
  const texts = new Map(rows.map(row => [row, [...row.cells].map(c => c.textContent.trim()).join(" ").toLowerCase()]));
  apply();

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const active = chosen.filter(({ control }) => control.value !== "*");
    let shown = 0;
    for (const row of rows) {
      const fits = active.every(({ index, control }) => `=${cellText(row, index)}` === control.value)
        && words.every(word => texts.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    const why = [...active.map(({ label, control }) => `${label} ${control.value.slice(1)}`), ...words.map(w => `“${w}”`)];
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows${why.length ? `: ${why.join(", ")}` : ""}`;
  }
}

// --- start ----------------------------------------------------------------------------------------

scatter();
strips();
growth();
document.querySelectorAll(".table").forEach(enhance);

// On paper nothing can be opened or chosen: everything is shown.
matchMedia("print").addEventListener("change", event => {
  for (const node of document.querySelectorAll("details.set, .panel")) {
    if (event.matches) {
      node.dataset.before = `${node.hidden} ${node.open ?? ""}`;
      node.hidden = false;
      node.open = true;
    } else {
      const [hidden, open] = node.dataset.before.split(" ");
      node.hidden = hidden === "true";
      node.open = open === "true";
    }
  }
});
