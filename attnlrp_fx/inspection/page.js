"use strict";
// Items are numbered: the nodes first, then the groups. Rows come from Python; here boxes are
// measured, stacked and drawn, only those that are in sight.
const data = JSON.parse(document.getElementById("data").textContent);
const {nodes, groups, edges, strings} = data;
const N = nodes.length, ROOT = N;
const text = (node, key) => (key in node ? strings[node[key]] : "");
const parent = new Int32Array(N + groups.length).fill(-1);
groups.forEach((g, i) => g.rows.forEach(row => row.forEach(c => { parent[c] = N + i; })));
const open = new Uint8Array(groups.length);
const isGroup = i => i >= N, group = i => groups[i - N];
const inputs = Array.from({length: N}, () => []), users = Array.from({length: N}, () => []);
edges.forEach((e, k) => { inputs[e[1]].push(k); users[e[0]].push(k); });

// What a group is, summed over the nodes in it.
const facts = groups.map(() => ({count: 0, kinds: {}, absorbed: 0, received: 0}));
nodes.forEach((node, i) => {
  const lost = Object.values(node.causes || {}).reduce((a, b) => a + b, 0);
  node.lost = lost;
  for (let p = parent[i]; p >= 0; p = parent[p]) {
    const f = facts[p - N], kind = text(node, "kind");
    f.count++; f.kinds[kind] = (f.kinds[kind] || 0) + 1; f.absorbed += lost;
  }
});
const target = data.ledger ? Math.abs(data.ledger.target) || 1 : 1;
const inside = (i, g) => { while (i >= 0 && i !== g) i = parent[i]; return i === g; };
edges.forEach(([a, b, r]) => {  // what flows into a group from behind, back towards the inputs
  for (let p = parent[a]; p >= 0 && !inside(b, p); p = parent[p]) facts[p - N].received += r || 0;
});

// Boxes: measured from the leaves up, placed from the root down.
const GAP = 26, ROW = 34, PAD = 18, HEAD = 26, HIGH = 30;
const box = Array.from({length: N + groups.length}, () => ({x: 0, y: 0, w: 0, h: 0}));
const pen = document.createElement("canvas").getContext("2d");
const font = (size, weight = "") => `${weight} ${size}px system-ui, sans-serif`;
const op = i => text(nodes[i], "kind") === "source" ? "explained" : text(nodes[i], "op").replace(/^aten\./, "").replace(/\.[A-Za-z_]+$/, "");
const own = i => {  // the name of a module that is shown as the one node in it
  const module = text(nodes[i], "module"), around = parent[i] >= 0 ? group(parent[i]) : {path: ""};
  return module && module !== around.path && around.kind === "module" ? module.split(".").pop() : "";
};
const label = i => isGroup(i) ? group(i).name || "model" : own(i) ? `${own(i)} · ${op(i)}` : op(i);
const under = i => {
  if (!isGroup(i)) return "";
  const g = group(i), f = facts[i - N];
  return g.kind === "stack" ? `${g.rows.flat().length} alike, ${f.count} nodes` : `${f.count} node${f.count > 1 ? "s" : ""}`;
};
const widths = new Map();
function widthOf(i) {
  if (!widths.has(i)) {
    pen.font = font(13, isGroup(i) ? "600" : "");
    const first = pen.measureText(label(i)).width;
    pen.font = font(11);
    widths.set(i, Math.max(56, Math.max(first, pen.measureText(under(i)).width) + 24));
  }
  return widths.get(i);
}
function measure(i) {
  const b = box[i];
  if (!isGroup(i)) { b.w = widthOf(i); b.h = HIGH; return; }
  if (!open[i - N]) { b.w = widthOf(i) + 8; b.h = 44; return; }
  let w = widthOf(i) + 20, h = HEAD + PAD;
  for (const row of group(i).rows) {
    let wide = -GAP, high = 0;
    for (const c of row) { measure(c); wide += box[c].w + GAP; high = Math.max(high, box[c].h); }
    w = Math.max(w, wide + 2 * PAD + 28); h += high + ROW;
  }
  b.w = w; b.h = h - ROW + PAD;
}
function place(i, x, y) {
  const b = box[i]; b.x = x; b.y = y;
  if (!isGroup(i) || !open[i - N]) return;
  let top = y + HEAD + PAD;
  for (const row of group(i).rows) {
    const wide = row.reduce((sum, c) => sum + box[c].w + GAP, -GAP);
    const high = Math.max(...row.map(c => box[c].h));
    let left = x + (b.w - wide) / 2;
    for (const c of row) { place(c, left, top + (high - box[c].h) / 2); left += box[c].w + GAP; }
    top += high + ROW;
  }
}

// Edges between what is seen: of a folded group, all that go in or out together.
let links = [], seen = 0;
function shownOf(i) {
  let found = i;
  for (let p = parent[i]; p >= 0; p = parent[p]) if (!open[p - N]) found = p;
  return found;
}
function arrange() {
  measure(ROOT); place(ROOT, 0, 0);
  const together = new Map(), as = Array.from({length: N}, (_, i) => shownOf(i));
  edges.forEach(([a, b, r], k) => {
    const from = as[a], to = as[b];
    if (from === to) return;
    const key = from * 1e6 + to, link = together.get(key) || {from, to, r: 0, on: false, count: 0};
    link.r += r || 0; link.count++; link.on = link.on || onPath.has(k);
    together.set(key, link);
  });
  links = [...together.values()];
  const shown = [...new Set(as)];
  seen = shown.length;
  for (const link of links) {  // how far to the side a long edge passes by what lies between
    const a = box[link.from], b = box[link.to], x = a.x + a.w / 2, top = a.y + a.h;
    link.bow = Math.min(60, 14 + (b.y - top) / 14) + a.w / 2;
    if (b.y - top > 90 && links.length * seen < 4e6) for (const i of shown) {
      const c = box[i];
      if (c.y > top && c.y + c.h < b.y && c.x < x && c.x + c.w > x) link.bow = Math.max(link.bow, Math.min(x - c.x, c.x + c.w - x) + 12);
    }
  }
  draw();
}

// Drawing.
const canvas = document.getElementById("graph"), ink = canvas.getContext("2d");
const view = {x: 0, y: 0, scale: 1};
let chosen = -1, over = -1, onPath = new Set(), colouring = "rule", pending = false;
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const scheme = matchMedia("(prefers-color-scheme: dark)");
let paint = {};
function readColours() {
  const probe = document.createElement("i"); document.body.append(probe);
  for (const name of ["ground", "paper", "ink", "dim", "line", "group", "accent"]) {
    probe.style.color = style(`--${name}`); paint[name] = getComputedStyle(probe).color;
  }
  probe.remove();
}
const FOR = "232,120,24", AGAINST = "58,128,210";
const signed = (value, strength) =>
  `rgba(${value >= 0 ? FOR : AGAINST},${Math.min(1, Math.max(0.06, strength))})`;
function fillOf(i) {
  if (colouring !== "rule") {
    const value = colouring === "relevance"
      ? (isGroup(i) ? facts[i - N].received : nodes[i].r || 0)
      : (isGroup(i) ? facts[i - N].absorbed : nodes[i].lost);
    return value ? signed(value, Math.sqrt(Math.abs(value) / target)) : null;
  }
  if (!isGroup(i)) return data.colours[text(nodes[i], "kind")] + "55";
  return null;
}
function draw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; drawNow(); });
}
function drawNow() {
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (canvas.width !== w * ratio || canvas.height !== h * ratio) {
    canvas.width = w * ratio; canvas.height = h * ratio;
  }
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.fillStyle = paint.ground; ink.fillRect(0, 0, w, h);
  ink.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
  const sight = {x0: -view.x / view.scale, y0: -view.y / view.scale};
  sight.x1 = sight.x0 + w / view.scale; sight.y1 = sight.y0 + h / view.scale;
  drawGroups(ROOT, sight); drawLinks(sight); drawItems(ROOT, sight);
}
const inSight = (b, s) => b.x < s.x1 && b.x + b.w > s.x0 && b.y < s.y1 && b.y + b.h > s.y0;
function rounded(b, r) { ink.beginPath(); ink.roundRect(b.x, b.y, b.w, b.h, r); }
function drawGroups(i, s) {
  if (!isGroup(i) || !open[i - N] || !inSight(box[i], s)) return;
  rounded(box[i], 10);
  ink.fillStyle = i === ROOT ? paint.ground : paint.group; ink.fill();
  ink.globalAlpha = i === ROOT ? 0 : 1;
  ink.lineWidth = i === chosen ? 2.5 : 1; ink.strokeStyle = i === chosen ? paint.accent : paint.line;
  ink.stroke(); ink.globalAlpha = 1;
  if (view.scale > 0.3 && i !== ROOT) {
    ink.fillStyle = paint.dim; ink.font = font(12, "600"); ink.textAlign = "left";
    ink.fillText(`⌄ ${group(i).name || label(i)}`, box[i].x + 12, box[i].y + 18);
  }
  for (const row of group(i).rows) for (const c of row) drawGroups(c, s);
}
const thickness = r => 1 + 11 * Math.sqrt(Math.min(1, Math.abs(r) / target));
function drawLinks(s) {
  const faint = onPath.size > 0;
  for (const link of links) {
    const a = box[link.from], b = box[link.to];
    const x0 = a.x + a.w / 2, y0 = a.y + a.h, x1 = b.x + b.w / 2, y1 = b.y;
    if (Math.max(y0, y1) < s.y0 || Math.min(y0, y1) > s.y1) continue;
    const lit = link.on || link.from === chosen || link.to === chosen;
    ink.lineWidth = data.ledger ? (link.r ? thickness(link.r) : 0.7) : 1.2;
    ink.strokeStyle = data.ledger && link.r
      ? signed(link.r, lit ? 1 : faint ? 0.12 : 0.25 + 0.6 * Math.sqrt(Math.abs(link.r) / target))
      : lit ? paint.accent : paint.line;
    if (lit && !(data.ledger && link.r)) ink.lineWidth = 2;
    const far = y1 - y0, bow = far > 90 ? link.bow : 0;
    const side = x1 > x0 + 4 ? 1 : x1 < x0 - 4 ? -1 : link.to % 2 ? 1 : -1;
    ink.beginPath(); ink.moveTo(x0, y0);
    if (bow && Math.abs(x1 - x0) < bow) {
      const lane = x0 + side * bow, bend = Math.min(60, far / 4);
      ink.bezierCurveTo(x0, y0 + bend / 2, lane, y0 + bend / 4, lane, y0 + bend);
      ink.lineTo(lane, y1 - bend);
      ink.bezierCurveTo(lane, y1 - bend / 4, x1, y1 - bend / 2, x1, y1);
    } else {
      const bend = Math.max(14, Math.min(80, Math.abs(far) / 2));
      ink.bezierCurveTo(x0, y0 + bend, x1, y1 - bend, x1, y1);
    }
    ink.stroke();
  }
}
function drawItems(i, s) {
  const b = box[i];
  if (!inSight(b, s)) return;
  if (isGroup(i) && open[i - N]) { for (const row of group(i).rows) for (const c of row) drawItems(c, s); return; }
  if (isGroup(i) && group(i).kind === "stack") {
    for (const off of [6, 3]) {
      rounded({x: b.x + off, y: b.y + off, w: b.w, h: b.h}, 8);
      ink.fillStyle = paint.paper; ink.fill(); ink.strokeStyle = paint.line; ink.lineWidth = 1; ink.stroke();
    }
  }
  rounded(b, isGroup(i) ? 8 : 6);
  ink.fillStyle = paint.paper; ink.fill();
  const fill = fillOf(i);
  if (fill) { ink.fillStyle = fill; ink.fill(); }
  ink.lineWidth = i === chosen ? 3 : i === over ? 2 : 1;
  ink.strokeStyle = i === chosen ? paint.accent : isGroup(i) || colouring !== "rule" ? paint.line : data.colours[text(nodes[i], "kind")];
  ink.stroke();
  if (isGroup(i) && colouring === "rule") drawMix(i, b);
  if (view.scale < 0.28) return;
  ink.fillStyle = paint.ink; ink.textAlign = "center"; ink.font = font(13, isGroup(i) ? "600" : "");
  const middle = b.x + b.w / 2;
  ink.fillText(label(i), middle, b.y + (isGroup(i) ? 18 : 20));
  if (isGroup(i)) { ink.font = font(11); ink.fillStyle = paint.dim; ink.fillText(under(i), middle, b.y + 33); }
}
function drawMix(i, b) {  // a folded group's rules, as a bar
  const f = facts[i - N];
  let x = b.x + 8;
  for (const [kind, count] of Object.entries(f.kinds)) {
    const w = (b.w - 16) * count / f.count;
    ink.fillStyle = data.colours[kind]; ink.fillRect(x, b.y + b.h - 6, w, 3); x += w;
  }
}

// Moving about.
function fit(i = ROOT) {
  const b = box[i], w = canvas.clientWidth, h = canvas.clientHeight;
  view.scale = Math.min(1.4, (w - 40) / b.w, (h - 40) / b.h);
  if (i === ROOT && view.scale < 0.35) view.scale = Math.min(1, Math.max(0.35, (w - 40) / b.w));
  view.x = (w - b.w * view.scale) / 2 - b.x * view.scale;
  view.y = b.h * view.scale < h - 40 ? (h - b.h * view.scale) / 2 - b.y * view.scale : 20 - b.y * view.scale;
  draw();
}
function at(event) {
  const r = canvas.getBoundingClientRect();
  const x = (event.clientX - r.left - view.x) / view.scale, y = (event.clientY - r.top - view.y) / view.scale;
  let i = ROOT, hit = -1;
  const holds = b => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h;
  while (i >= 0 && holds(box[i])) {
    hit = i;
    if (!isGroup(i) || !open[i - N]) break;
    i = group(i).rows.flat().find(c => holds(box[c])) ?? -1;
  }
  return hit === ROOT ? -1 : hit;
}
function toggle(i) {
  const before = {...box[i]};
  open[i - N] = open[i - N] ? 0 : 1;
  arrange();
  view.x += (before.x - box[i].x) * view.scale; view.y += (before.y - box[i].y) * view.scale;
  const mid = (before.w - box[i].w) / 2; view.x += mid * view.scale;
  draw();
}
function foldAll() {
  open.fill(0); open[0] = 1;
  for (let only = ROOT; ;) {  // what lies alone in a group is opened with it
    const children = group(only).rows.flat().filter(c => isGroup(c) && group(c).kind === "module");
    if (children.length !== 1 || group(only).rows.flat().length > 12) break;
    only = children[0]; open[only - N] = 1;
  }
  arrange(); fit();
}
function reveal(i, centre = true) {
  for (let p = parent[i]; p >= 0; p = parent[p]) open[p - N] = 1;
  arrange();
  if (centre) {
    view.scale = Math.max(view.scale, 0.8);
    view.x = canvas.clientWidth / 2 - (box[i].x + box[i].w / 2) * view.scale;
    view.y = canvas.clientHeight / 2 - (box[i].y + box[i].h / 2) * view.scale;
  }
  choose(i);
}
function choose(i) { chosen = i; panel(i); draw(); }
let drag = null;
canvas.addEventListener("pointerdown", e => { drag = {x: e.clientX, y: e.clientY, moved: 0}; canvas.setPointerCapture(e.pointerId); });
canvas.addEventListener("pointermove", e => {
  if (!drag) { const now = at(e); canvas.classList.toggle("over", now >= 0); if (now !== over) { over = now; draw(); } return; }
  const dx = e.clientX - drag.x, dy = e.clientY - drag.y;
  drag.moved += Math.abs(dx) + Math.abs(dy); drag.x = e.clientX; drag.y = e.clientY;
  view.x += dx; view.y += dy; draw();
});
canvas.addEventListener("pointerup", e => {
  const moved = drag ? drag.moved : 9; drag = null;
  if (moved > 4) return;
  const i = at(e);
  if (i >= 0 && isGroup(i)) toggle(i);
  choose(i);
});
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const r = canvas.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top;
  const next = Math.min(3, Math.max(0.03, view.scale * Math.exp(-e.deltaY * (e.ctrlKey ? 0.01 : 0.0015))));
  view.x = x - (x - view.x) * next / view.scale; view.y = y - (y - view.y) * next / view.scale;
  view.scale = next; draw();
}, {passive: false});
canvas.addEventListener("keydown", e => {
  const step = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]}[e.key];
  if (step) { view.x += step[0]; view.y += step[1]; draw(); }
  else if (e.key === "Enter" && chosen >= 0 && isGroup(chosen)) toggle(chosen);
});

// The panel. Everything is put in as text, never as markup.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") made.addEventListener("click", value); else if (key === "style") made.style.cssText = value;
    else made.className = value;
  }
  made.append(...children.filter(c => c !== "" && c !== null));
  return made;
}
const share = v => `${Math.abs(v) < 5e-4 && v ? (100 * v).toPrecision(2) : (100 * v).toFixed(1)} %`;
const percent = v => share(v / (data.ledger.target || 1));
const go = (i, words) => el("button", {class: "go", on: () => reveal(i)}, words);
function rows(pairs) {
  return el("dl", {}, ...pairs.filter(p => p[1]).flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
}
function amounts(object) {
  const most = Math.max(...Object.values(object).map(Math.abs), 1e-30);
  return el("table", {}, ...Object.entries(object).filter(([, v]) => v).slice(0, 12).map(([name, v]) => el("tr", {},
    el("td", {}, name), el("td", {}, el("span", {class: "bar", style: `width:${60 * Math.abs(v) / most}px;background:${signed(v, 0.8)}`})),
    el("td", {}, percent(v)))));
}
function panel(i) {
  const side = document.getElementById("panel");
  side.replaceChildren(...(i < 0 ? overview() : isGroup(i) ? ofGroup(i) : ofNode(i)));
  side.scrollTop = 0;
}
function overview() {
  const found = [el("h2", {}, document.title), el("p", {}, `Composite ${data.composite}. Click a module to unfold it, a node for its rule and its line; drag and scroll to move.`)];
  if (!data.ledger) return found;
  found.push(el("h3", {}, `relevance of ${data.ledger.target} reaches`), amounts(data.ledger.inputs),
    el("h3", {}, "is absorbed by"), amounts(data.ledger.causes),
    el("ul", {}, ...data.ledger.sentences.map(s => el("li", {}, s))),
    el("h3", {}, "paths that carry most"));
  found.push(el("ol", {}, ...data.paths.map(p => el("li", {}, el("button", {class: "go", on: () => light(p)},
    `${share(p.share)}, ${p.nodes.length} nodes`), ` by ${waypoints(p)}`))));
  if (onPath.size) found.push(el("button", {class: "go", on: () => { onPath = new Set(); arrange(); panel(-1); }}, "no path"));
  return found;
}
const travelled = {};  // by module, how many of the paths pass it
data.paths.forEach(p => new Set(p.nodes.map(i => text(nodes[i], "module"))).forEach(m => { travelled[m] = (travelled[m] || 0) + 1; }));
function waypoints(path) {  // what it has and few others have
  const own = [...new Set(path.nodes.map(i => text(nodes[i], "module")))].filter(m => m && travelled[m] < data.paths.length);
  return own.sort((a, b) => travelled[a] - travelled[b]).slice(0, 2).join(", ") || "what all of them share";
}
function light(path) {
  const on = new Set(path.nodes.map((i, k) => k ? `${path.nodes[k - 1]},${i}` : ""));
  onPath = new Set(edges.flatMap(([a, b], k) => on.has(`${a},${b}`) ? [k] : []));
  arrange(); panel(-1);
}
function ofGroup(i) {
  const g = group(i), f = facts[i - N];
  const first = nodes.find((n, k) => inside(k, i) && text(n, "module") === g.path);
  const found = [el("h2", {}, g.path || "model"), rows([["class", first ? text(first, "class") : ""], ["is", g.kind === "stack" ? `${g.rows.flat().length} modules of one structure` : ""],
    ["nodes", String(f.count)], ["receives", data.ledger ? percent(f.received) : ""], ["absorbs", data.ledger ? percent(f.absorbed) : ""]]),
    el("h3", {}, "rules")];
  found.push(el("table", {}, ...Object.entries(f.kinds).sort((a, b) => b[1] - a[1]).map(([kind, count]) => el("tr", {},
    el("td", {}, el("span", {class: "chip", style: `background:${data.colours[kind]}`}), kind || "constant"), el("td", {}, String(count))))));
  return found;
}
function ofNode(i) {
  const n = nodes[i], kind = text(n, "kind");
  const found = [el("h2", {}, el("span", {class: "chip", style: `background:${data.colours[kind]}`}), n.name),
    rows([["op", text(n, "op")], ["rule", text(n, "rule") || "none: no relevance passes"], ["by", text(n, "by")], ["formula", text(n, "formula")],
      ["value", text(n, "shape")], ["module", text(n, "module") ? `${text(n, "module")} (${text(n, "class")})` : ""], ["made by", text(n, "made")]])];
  if (text(n, "source")) found.push(el("h3", {}, "your line"), el("pre", {}, text(n, "source")));
  found.push(el("h3", {}, "rewritten"), el("pre", {}, n.code));
  if (n.parts) found.push(el("h3", {}, "made of"), el("p", {}, n.parts.join(", ")));
  if (n.misses) found.push(el("h3", {}, "near misses"), el("ul", {}, ...n.misses.map(m => el("li", {}, m))));
  if (data.ledger && "r" in n) found.push(el("h3", {}, `receives ${percent(n.r)}`), n.lost ? amounts(n.causes) : "");
  const near = (list, end) => el("ul", {}, ...list.map(k => el("li", {}, go(edges[k][end], nodes[edges[k][end]].name),
    data.ledger && edges[k][2] ? ` ${percent(edges[k][2])}` : "")));
  if (inputs[i].length) found.push(el("h3", {}, "reads"), near(inputs[i], 0));
  if (users[i].length) found.push(el("h3", {}, "is read by"), near(users[i], 1));
  return found;
}

// Search.
const hay = nodes.map(n => [n.name, n.code, ...["op", "rule", "module", "class", "source"].map(k => text(n, k))].join("\n").toLowerCase());
const field = document.getElementById("search"), results = document.getElementById("results");
let hits = [], atHit = -1;
function find(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  hits = wanted.length ? hay.flatMap((h, i) => wanted.every(w => h.includes(w)) ? [i] : []) : [];
  atHit = -1;
  document.getElementById("found").textContent = wanted.length ? `${hits.length} found` : "";
  results.hidden = !hits.length;
  results.replaceChildren(...hits.slice(0, 60).map((i, k) => el("li", {on: () => { atHit = k; show(); }}, nodes[i].name,
    el("small", {}, `${text(nodes[i], "op")}  ${text(nodes[i], "rule")}  ${text(nodes[i], "module")}`))));
}
function show() { reveal(hits[atHit]); [...results.children].forEach((li, k) => li.classList.toggle("at", k === atHit)); }
field.addEventListener("input", () => find(field.value));
field.addEventListener("keydown", e => {
  if (e.key === "Enter" && hits.length) { atHit = (atHit + (e.shiftKey ? hits.length - 1 : 1)) % hits.length; show(); }
  if (e.key === "Escape") { results.hidden = true; field.blur(); }
});
canvas.addEventListener("pointerdown", () => { results.hidden = true; });

// Beginning.
const choices = data.ledger ? ["rule", "relevance", "absorbed"] : ["rule"];
const select = document.getElementById("colour");
select.append(...choices.map(c => { const o = el("option", {}, c); o.value = c; return o; }));
select.addEventListener("change", () => { colouring = select.value; legend(); draw(); });
function legend() {
  const shown = colouring === "rule"
    ? Object.entries(data.colours).map(([kind, colour]) => [colour, kind === "source" ? "explained input" : kind || "constant"])
    : [[signed(1, 0.9), `${colouring}: for the target`], [signed(-1, 0.9), `${colouring}: against it`]];
  document.getElementById("legend").replaceChildren(...shown.map(([colour, words]) => el("div", {}, el("span", {class: "chip", style: `background:${colour}`}), words)));
}
document.getElementById("fold").addEventListener("click", foldAll);
document.getElementById("fit").addEventListener("click", () => fit());
document.getElementById("facts").textContent = `${N} nodes, ${edges.length} edges, composite ${data.composite}`;
addEventListener("resize", draw);
scheme.addEventListener("change", () => { readColours(); draw(); });
readColours(); legend(); foldAll(); panel(-1);
const graph = {  // for scripts and tests
  get seen() { return seen; },
  get chosen() { return chosen < 0 ? "" : isGroup(chosen) ? group(chosen).path : nodes[chosen].name; },
  find, reveal, foldAll, fit,
  centre(path) {  // where a module or a node is on the screen
    const g = groups.findIndex(x => x.path === path), i = g >= 0 ? N + g : nodes.findIndex(n => n.name === path);
    const b = box[i], r = canvas.getBoundingClientRect();
    return {x: r.left + view.x + (b.x + b.w / 2) * view.scale, y: r.top + view.y + (b.y + Math.min(b.h / 2, 12)) * view.scale};
  },
  unfold() { open.fill(1); arrange(); fit(); drawNow(); },
};
window.graph = graph;
