"use strict";
// A map of points, without a library and without network. Everything that a user's data says enters through textContent.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const n = data.n;
  const X = new Float32Array(bytes(data.x).buffer), Y = new Float32Array(bytes(data.y).buffer);
  const columns = data.columns.map((c) => ({ ...c, codes: new Int16Array(bytes(c.codes).buffer) }));
  const isText = data.modality ? bytes(data.modality) : new Uint8Array(n);
  const joint = isText.includes(1) && isText.includes(0);
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b5ea7", "#882255", "#117733"];
  const DARK = ["#4da3e0", "#f28c45", "#2fc79b", "#e3a3c7", "#f2bd3d", "#9bd8fa", "#b39be0", "#d9799f", "#6fbf83"];
  const STEPS = { light: ["#440154", "#3b528b", "#21918c", "#4fb35e", "#a5c42a", "#dbb300"], dark: ["#7a5fa8", "#5c86c9", "#3cb5ad", "#6ed07d", "#c3dd4e", "#fde725"] };
  const GREY = { light: "#a9b2ba", dark: "#5d6a75" };
  const SHAPES = [["circle", "square", "diamond"], ["up", "down", "cross"]];
  const MAX_HITS = 60, REACH_PX = 12;

  // ---- the plane: one scale for both axes, y upwards
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (let i = 0; i < n; i++) { x0 = Math.min(x0, X[i]); x1 = Math.max(x1, X[i]); y0 = Math.min(y0, Y[i]); y1 = Math.max(y1, Y[i]); }
  const wide = Math.max(x1 - x0, y1 - y0) || 1;
  const U = new Float32Array(n), V = new Float32Array(n);
  for (let i = 0; i < n; i++) { U[i] = (X[i] - (x0 + x1) / 2) / wide + 0.5; V[i] = 0.5 - (Y[i] - (y0 + y1) / 2) / wide; }

  // ---- a grid, so that the point under the pointer is found without looking at all points
  const G = Math.max(8, Math.min(256, Math.ceil(Math.sqrt(n / 2))));
  const cellOf = (u) => Math.max(0, Math.min(G - 1, Math.floor(u * G)));
  const starts = new Int32Array(G * G + 1), cells = new Int32Array(n);
  for (let i = 0; i < n; i++) starts[cellOf(V[i]) * G + cellOf(U[i]) + 1]++;
  for (let c = 0; c < G * G; c++) starts[c + 1] += starts[c];
  const fill = starts.slice();
  for (let i = 0; i < n; i++) cells[fill[cellOf(V[i]) * G + cellOf(U[i])]++] = i;

  // ---- state
  let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  let column = columns[0], hidden = new Set(), order = null;
  let view = { k: 1, x: 0, y: 0 }, drawn = null, width = 1, height = 1, ratio = 1;
  let tool = "pan", path = null, hovered = -1, hits = [], settle = 0, keyboard = false;
  const selected = new Uint8Array(n);
  let chosen = 0;
  const base = $("base"), over = $("over"), layer = document.createElement("canvas");

  const colourOf = (code) => {
    if (code < 0) return GREY[theme];
    const tones = column.ordered ? STEPS[theme] : theme === "dark" ? DARK : LIGHT;
    if (!column.ordered) return tones[code % tones.length];
    return tones[Math.round((code * (tones.length - 1)) / Math.max(1, column.categories.length - 1))];
  };
  const shapeOf = (code, text) => SHAPES[joint ? text : 0][column.ordered || code < 0 ? 0 : Math.floor(code / LIGHT.length) % 3];
  const radius = () => Math.max(1.6, Math.min(9, 5.2 * Math.pow(500 / Math.max(n, 60), 0.22) * Math.pow(Math.max(1, view.k / fitted().k), 0.28)));

  function outline(g, shape, x, y, r) {
    g.beginPath();
    if (shape === "circle") g.arc(x, y, r, 0, 7);
    else if (shape === "square") g.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
    else {
      const d = { diamond: [0, -1.25, 1.25, 0, 0, 1.25, -1.25, 0], up: [0, -1.25, 1.15, 0.85, -1.15, 0.85], down: [0, 1.25, 1.15, -0.85, -1.15, -0.85],
        cross: [-0.4, -1.2, 0.4, -1.2, 0.4, -0.4, 1.2, -0.4, 1.2, 0.4, 0.4, 0.4, 0.4, 1.2, -0.4, 1.2, -0.4, 0.4, -1.2, 0.4, -1.2, -0.4, -0.4, -0.4] }[shape];
      for (let i = 0; i < d.length; i += 2) g[i ? "lineTo" : "moveTo"](x + d[i] * r, y + d[i + 1] * r);
      g.closePath();
    }
  }
  function sprite(code, text, r) {
    const side = Math.ceil((2.6 * r + 2) * ratio), c = document.createElement("canvas");
    c.width = c.height = side;
    const g = c.getContext("2d");
    outline(g, shapeOf(code, text), side / 2, side / 2, r * ratio);
    g.fillStyle = colourOf(code);
    g.fill();
    if (r > 2.4) { g.lineWidth = 0.7 * ratio; g.strokeStyle = theme === "dark" ? "#0009" : "#fffb"; g.stroke(); }
    return c;
  }

  // ---- drawing: `layer` holds the crisp picture of `drawn`; while the view moves it is only shifted and scaled
  const fitted = () => { const k = 0.92 * Math.min(width, height); return { k, x: (width - k) / 2, y: (height - k) / 2 }; };
  const paper = () => (theme === "dark" ? [23, 33, 42] : [255, 255, 255]);
  function stamp(code, text, r) { // a sprite as a list of pixels: column, row, share in 256ths, red, green, blue
    const c = sprite(code, text, r), pixels = c.getContext("2d").getImageData(0, 0, c.width, c.width).data, found = [];
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) found.push((i / 4) % c.width, Math.floor(i / 4 / c.width), pixels[i + 3], pixels[i], pixels[i + 1], pixels[i + 2]);
    return { side: c.width, list: Int16Array.from(found) };
  }
  function render() { // pixels are blended here: 50,000 calls of drawImage take half a second, this a few frames
    const g = layer.getContext("2d"), r = radius(), w = layer.width, h = layer.height, picture = g.createImageData(w, h), d = picture.data, ground = paper();
    for (let i = 0; i < d.length; i += 4) { d[i] = ground[0]; d[i + 1] = ground[1]; d[i + 2] = ground[2]; d[i + 3] = 255; }
    const stamps = [-1, ...column.categories.keys()].map((code) => [stamp(code, 0, r), joint ? stamp(code, 1, r) : null]);
    const half = stamps[0][0].side / 2, side = stamps[0][0].side, k = view.k * ratio, dx = view.x * ratio - half, dy = view.y * ratio - half;
    for (const pass of chosen ? [0, 1] : [1]) {
      const share = chosen && !pass ? 0.16 : n > 8000 ? 0.8 : 0.88;
      for (const i of order) {
        if (chosen && selected[i] !== pass) continue;
        const x = Math.floor(U[i] * k + dx), y = Math.floor(V[i] * k + dy);
        if (x < 0 || y < 0 || x + side > w || y + side > h) continue;
        const list = stamps[column.codes[i] + 1][joint ? isText[i] : 0].list;
        for (let s = 0; s < list.length; s += 6) {
          const o = ((y + list[s + 1]) * w + x + list[s]) * 4, a = (list[s + 2] * share) / 255;
          d[o] += (list[s + 3] - d[o]) * a; d[o + 1] += (list[s + 4] - d[o + 1]) * a; d[o + 2] += (list[s + 5] - d[o + 2]) * a;
        }
      }
    }
    g.putImageData(picture, 0, 0);
    drawn = { ...view };
    paint();
  }
  function paint() {
    const g = base.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, base.width, base.height);
    if (drawn) {
      const s = view.k / drawn.k;
      g.setTransform(s, 0, 0, s, (view.x - drawn.x * s) * ratio, (view.y - drawn.y * s) * ratio);
      g.drawImage(layer, 0, 0);
    }
    paintOver();
  }
  function paintOver() {
    const g = over.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    const ink = theme === "dark" ? "#fff" : "#16202b", r = radius();
    g.lineWidth = 1.6; g.strokeStyle = ink;
    for (const i of hits) { g.beginPath(); g.arc(U[i] * view.k + view.x, V[i] * view.k + view.y, r + 3, 0, 7); g.stroke(); }
    if (hovered >= 0) { g.lineWidth = 2.4; g.beginPath(); g.arc(U[hovered] * view.k + view.x, V[hovered] * view.k + view.y, r + 4, 0, 7); g.stroke(); }
    if (keyboard) { g.lineWidth = 1; g.beginPath(); g.moveTo(width / 2 - 9, height / 2); g.lineTo(width / 2 + 9, height / 2); g.moveTo(width / 2, height / 2 - 9); g.lineTo(width / 2, height / 2 + 9); g.stroke(); }
    if (path && path.length > 1) {
      g.beginPath();
      corners(path).forEach((p, i) => g[i ? "lineTo" : "moveTo"](p[0], p[1]));
      g.closePath();
      g.fillStyle = theme === "dark" ? "#58c0d433" : "#0f6c8122"; g.fill();
      g.setLineDash([5, 4]); g.lineWidth = 1.5; g.stroke(); g.setLineDash([]);
    }
  }
  function moved() { // at once when few, else the shifted picture now and the crisp one when the hand rests
    hideTip();
    clearTimeout(settle);
    if (n <= 12000) { requestAnimationFrame(render); return; }
    requestAnimationFrame(paint);
    settle = setTimeout(render, 90);
  }
  const corners = (p) => (tool === "box" ? [p[0], [p.at(-1)[0], p[0][1]], p.at(-1), [p[0][0], p.at(-1)[1]]] : p);
  function resize() {
    const box = $("stage").getBoundingClientRect(), first = width === 1;
    const old = { ...view }, before = [width, height];
    ratio = Math.min(2, devicePixelRatio || 1); width = Math.max(1, box.width); height = Math.max(1, box.height);
    for (const c of [base, over, layer]) { c.width = Math.round(width * ratio); c.height = Math.round(height * ratio); }
    view = first ? fitted() : { k: old.k, x: old.x + (width - before[0]) / 2, y: old.y + (height - before[1]) / 2 };
    render();
  }
  function zoom(factor, x = width / 2, y = height / 2) {
    const k = Math.max(fitted().k * 0.4, Math.min(fitted().k * 400, view.k * factor)), s = k / view.k;
    view = { k, x: x - (x - view.x) * s, y: y - (y - view.y) * s };
    moved();
  }

  // ---- the point under the pointer
  function nearest(px, py, reach = REACH_PX) {
    const u = (px - view.x) / view.k, v = (py - view.y) / view.k, d = reach / view.k;
    let best = -1, least = d * d;
    for (let row = cellOf(v - d); row <= cellOf(v + d); row++) for (let c = row * G + cellOf(u - d), last = row * G + cellOf(u + d); c <= last; c++) {
      for (let j = starts[c]; j < starts[c + 1]; j++) {
        const i = cells[j];
        if (hidden.has(column.codes[i])) continue;
        const far = (U[i] - u) ** 2 + (V[i] - v) ** 2;
        if (far < least || (far === least && i > best)) { least = far; best = i; }
      }
    }
    return best;
  }
  const nameOf = (c, code) => (code < 0 ? c.missing : c.categories[code]);
  const sheets = data.thumbnails ? data.thumbnails.sheets.map((source) => { const image = new Image(); image.src = source; return image; }) : [];
  const places = data.thumbnails ? new Int32Array(bytes(data.thumbnails.cells).buffer) : null;
  function showTip(i) {
    $("tip-id").textContent = data.ids[i];
    const facts = $("tip-facts");
    facts.replaceChildren();
    const shown = [column, ...columns.filter((c) => c !== column)].slice(0, 6);
    for (const c of shown) {
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = c.name; value.textContent = nameOf(c, c.codes[i]);
      facts.append(term, value);
    }
    const text = data.texts && data.texts[i];
    $("tip-text").textContent = !text ? "" : text.length > 420 ? text.slice(0, 420) + " …" : text;
    const thumb = $("thumb");
    thumb.hidden = !places || places[i] < 0;
    if (!thumb.hidden) {
      const t = data.thumbnails, at = places[i] % (t.across * t.across);
      thumb.width = thumb.height = t.size;
      thumb.getContext("2d").drawImage(sheets[Math.floor(places[i] / (t.across * t.across))], (at % t.across) * t.size, Math.floor(at / t.across) * t.size, t.size, t.size, 0, 0, t.size, t.size);
    }
    const tip = $("tip"), x = U[i] * view.k + view.x, y = V[i] * view.k + view.y;
    tip.hidden = false;
    tip.style.left = Math.max(6, x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16) + "px";
    tip.style.top = Math.max(6, Math.min(height - tip.offsetHeight - 6, y - 20)) + "px";
  }
  function hideTip() { $("tip").hidden = true; hovered = -1; }
  function hover(px, py) {
    const i = nearest(px, py);
    if (i === hovered) return;
    hovered = i;
    if (i < 0) hideTip(); else showTip(i);
    paintOver();
  }

  // ---- selection
  function inside(polygon) {
    const p = polygon.map(([a, b]) => [(a - view.x) / view.k, (b - view.y) / view.k]);
    const us = p.map((q) => q[0]), vs = p.map((q) => q[1]);
    const [a, b, c, d] = [Math.min(...us), Math.max(...us), Math.min(...vs), Math.max(...vs)], found = [];
    for (let i = 0; i < n; i++) {
      const u = U[i], v = V[i];
      if (u < a || u > b || v < c || v > d || hidden.has(column.codes[i])) continue;
      let odd = false;
      for (let s = 0, e = p.length - 1; s < p.length; e = s++) if (p[s][1] > v !== p[e][1] > v && u < ((p[e][0] - p[s][0]) * (v - p[s][1])) / (p[e][1] - p[s][1]) + p[s][0]) odd = !odd;
      if (odd) found.push(i);
    }
    return found;
  }
  function select(rows, mode) {
    if (mode === "new") selected.fill(0);
    for (const i of rows) selected[i] = mode === "less" ? 0 : 1;
    chosen = selected.reduce((a, b) => a + b, 0);
    tell();
    render();
  }
  function tell() {
    $("save").disabled = $("clear").disabled = !chosen;
    $("counts").hidden = !chosen;
    $("chosen").textContent = chosen ? `${chosen.toLocaleString("en")} of ${n.toLocaleString("en")} points` : "Nothing yet: draw with the lasso or the rectangle.";
    $("live").textContent = chosen ? `${chosen.toLocaleString("en")} points selected` : "";
    const body = $("counts").tBodies[0], counts = new Map(), all = new Map();
    for (let i = 0; i < n; i++) { const c = column.codes[i]; all.set(c, (all.get(c) || 0) + 1); if (selected[i]) counts.set(c, (counts.get(c) || 0) + 1); }
    body.replaceChildren(...[...counts].sort((a, b) => b[1] - a[1]).map(([code, count]) => {
      const row = document.createElement("tr");
      for (const t of [nameOf(column, code), count.toLocaleString("en"), ((100 * count) / chosen).toFixed(1) + " %", ((100 * count) / all.get(code)).toFixed(1) + " %"]) row.insertCell().textContent = t;
      return row;
    }));
  }
  const cell = (value) => { const t = String(value ?? ""); return /[",\r\n]|^\s|\s$/.test(t) ? '"' + t.replaceAll('"', '""') + '"' : t; };
  function csv() {
    const head = ["id", ...(joint ? ["modality"] : []), "x", "y", ...columns.map((c) => c.name), ...(data.texts ? ["text"] : [])], lines = [head.map(cell).join(",")];
    for (let i = 0; i < n; i++) {
      if (!selected[i]) continue;
      const row = [data.ids[i], ...(joint ? [isText[i] ? "text" : "image"] : []), Number(X[i].toPrecision(7)), Number(Y[i].toPrecision(7)), ...columns.map((c) => (c.codes[i] < 0 ? "" : c.categories[c.codes[i]])), ...(data.texts ? [data.texts[i]] : [])];
      lines.push(row.map(cell).join(","));
    }
    return lines.join("\r\n") + "\r\n";
  }
  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", csv()], { type: "text/csv;charset=utf-8" }));
    link.download = "selection.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 2000);
  }

  // ---- colours and legend
  function rebuild() {
    const visible = [];
    for (let i = 0; i < n; i++) if (!hidden.has(column.codes[i])) visible.push(i);
    // Not labelled below; the rest shuffled in a fixed way, so that no class lies on top of the others.
    const late = (i) => (column.codes[i] < 0 ? 0 : 1);
    order = Int32Array.from(visible.map((i) => [late(i), (i * 2654435761) % 4294967296, i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((t) => t[2]));
    render();
  }
  function legend() {
    const counts = new Map();
    for (const code of column.codes) counts.set(code, (counts.get(code) || 0) + 1);
    const codes = [...column.categories.keys(), -1].filter((c) => counts.has(c));
    $("legend").replaceChildren(...codes.map((code) => {
      const item = document.createElement("li"), label = document.createElement("label"), box = document.createElement("input"), swatch = sprite(code, 0, 6), name = document.createElement("span"), count = document.createElement("span");
      swatch.style.width = swatch.style.height = swatch.width / ratio + "px";
      box.type = "checkbox"; box.checked = !hidden.has(code);
      name.className = "name"; name.textContent = nameOf(column, code);
      count.className = "count"; count.textContent = counts.get(code).toLocaleString("en");
      label.classList.toggle("off", !box.checked);
      box.addEventListener("change", () => { if (box.checked) hidden.delete(code); else hidden.add(code); label.classList.toggle("off", !box.checked); hideTip(); rebuild(); });
      label.append(box, swatch, name, count); item.append(label);
      return item;
    }));
    $("shapes").textContent = joint ? "round, square: images; pointed: texts" : `${column.categories.length} classes`;
  }
  function setColumn(index) { hideTip(); column = columns[index]; hidden = new Set(); legend(); tell(); rebuild(); }
  function setTheme(name) { hideTip(); theme = name; document.documentElement.dataset.theme = name; legend(); rebuild(); }

  // ---- search
  let lowered = null;
  function search() {
    const wanted = $("search").value.trim().toLowerCase();
    lowered ??= data.ids.map((id, i) => (data.texts && data.texts[i] ? id + "\n" + data.texts[i] : id).toLowerCase());
    const found = [];
    if (wanted) for (let i = 0; i < n; i++) if (lowered[i].includes(wanted)) found.push(i);
    hits = found.slice(0, 3000);
    $("hits").textContent = wanted ? `${found.length.toLocaleString("en")} matches` + (found.length > MAX_HITS ? `, first ${MAX_HITS} listed` : "") : "";
    $("take").hidden = !found.length;
    $("take").onclick = () => select(found, "new");
    $("results").replaceChildren(...found.slice(0, MAX_HITS).map((i) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = data.ids[i] + (data.texts && data.texts[i] ? " · " + data.texts[i].slice(0, 80) : "");
      button.addEventListener("click", () => go(i));
      item.append(button);
      return item;
    }));
    paintOver();
  }
  function go(i) {
    const k = Math.max(view.k, fitted().k * 4);
    view = { k, x: width / 2 - U[i] * k, y: height / 2 - V[i] * k };
    render(); hovered = i; showTip(i); paintOver();
  }

  // ---- pointer and keys
  const held = new Map();
  let last = null;
  const at = (e) => { const b = over.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
  over.addEventListener("pointerdown", (e) => {
    over.setPointerCapture(e.pointerId); over.focus({ preventScroll: true });
    keyboard = false; held.set(e.pointerId, at(e)); last = at(e); hideTip();
    if (tool === "pan" || held.size > 1) { path = null; over.classList.add("hold"); } else path = [at(e)];
  });
  over.addEventListener("pointermove", (e) => {
    const p = at(e);
    if (!held.has(e.pointerId)) { hover(...p); return; }
    const before = held.get(e.pointerId);
    held.set(e.pointerId, p);
    if (held.size === 2) {
      const [a, b] = [...held.values()], other = p === a ? b : a;
      zoom(Math.hypot(p[0] - other[0], p[1] - other[1]) / (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1), (p[0] + other[0]) / 2, (p[1] + other[1]) / 2);
    } else if (path) {
      if (Math.hypot(p[0] - path.at(-1)[0], p[1] - path.at(-1)[1]) > 2) { path.push(p); requestAnimationFrame(paintOver); }
    } else { view.x += p[0] - last[0]; view.y += p[1] - last[1]; last = p; moved(); }
  });
  const released = (e) => {
    held.delete(e.pointerId); over.classList.remove("hold");
    if (path && path.length > 2 && e.type === "pointerup") { const polygon = corners(path); path = null; select(inside(polygon), e.shiftKey ? "more" : e.altKey ? "less" : "new"); }
    path = null; paintOver();
  };
  over.addEventListener("pointerup", released);
  over.addEventListener("pointercancel", released);
  over.addEventListener("pointerleave", () => { if (!held.size) { hideTip(); paintOver(); } });
  over.addEventListener("wheel", (e) => { e.preventDefault(); zoom(Math.exp(-Math.max(-120, Math.min(120, e.deltaY)) * 0.0022), ...at(e)); }, { passive: false });
  over.addEventListener("dblclick", (e) => { if (tool === "pan") zoom(2, ...at(e)); });
  over.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
    if (e.ctrlKey || e.metaKey) return;
    if (step) { view.x += step[0]; view.y += step[1]; }
    else if (e.key === "+" || e.key === "=") zoom(1.5);
    else if (e.key === "-") zoom(1 / 1.5);
    else if (e.key === "0") view = fitted();
    else if (e.key === "Escape") { path = null; select([], "new"); }
    else if ({ p: 1, l: 1, r: 1 }[e.key]) setTool({ p: "pan", l: "lasso", r: "box" }[e.key]);
    else return;
    e.preventDefault();
    keyboard = Boolean(step) || "+-=0".includes(e.key);
    render();
    if (keyboard) hover(width / 2, height / 2);
  });
  function setTool(name) {
    tool = name;
    over.classList.toggle("draw", name !== "pan");
    document.querySelectorAll("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.tool === name)));
  }
  document.querySelectorAll("[data-tool]").forEach((b) => b.addEventListener("click", () => setTool(b.dataset.tool)));
  $("in").addEventListener("click", () => zoom(1.5));
  $("out").addEventListener("click", () => zoom(1 / 1.5));
  $("fit").addEventListener("click", () => { hideTip(); view = fitted(); render(); });
  $("theme").addEventListener("click", () => setTheme(theme === "dark" ? "light" : "dark"));
  $("all").addEventListener("click", () => { hidden.clear(); legend(); rebuild(); });
  $("none").addEventListener("click", () => { hidden = new Set(column.codes); legend(); hideTip(); rebuild(); });
  $("save").addEventListener("click", download);
  $("clear").addEventListener("click", () => select([], "new"));
  $("colour").append(...columns.map((c, i) => new Option(c.name, String(i))));
  $("colour").addEventListener("change", (e) => setColumn(Number(e.target.value)));
  let typing = 0;
  $("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 110); });
  document.documentElement.dataset.theme = theme;
  order = new Int32Array(0);
  resize();
  setColumn(0);
  new ResizeObserver(resize).observe($("stage"));
  document.documentElement.dataset.ready = "yes";
})();
