// The page of one slide: moving, zooming, the mask over the slide, the legend.
import {paint, palette} from "./paint.js";
import {Pyramid} from "./pyramid.js";

const find = (id) => document.getElementById(id);
const canvas = find("view");
const layer = document.createElement("canvas");
const state = {x: 0, y: 0, scale: 1, mask: true, outline: false, version: 0};
const opacities = {fill: 45, outline: 100}; // percent
let info, slide, mask, colours, drawing = false;
const shown = new Set();
const complaints = new Set();

start().catch((error) => complain(`This slide cannot be shown: ${error.message}`));

async function start() {
  info = await (await get("info.json")).json();
  document.title = `${info.name} - wsiseg`;
  find("name").textContent = info.name;
  info.problems.forEach(complain);
  fillNavigation();
  fillFacts();
  info.classes.filter((c) => !c.background).forEach((c) => shown.add(c.value));
  fillClasses();
  if (!info.size) {
    document.body.dataset.state = "idle";
    return;
  }
  const common = {tilePx: info.tile_px, changed: draw, failed: (error) => complain(error.message)};
  slide = new Pyramid({...common, levels: info.slide_levels, keep: 220,
    load: loadSlide, release: (bitmap) => bitmap.close()});
  mask = new Pyramid({...common, levels: info.mask_levels, keep: 160, load: loadMask,
    release: () => {}});
  recolour();
  listen();
  new ResizeObserver(resize).observe(canvas);
  resize();
  if (!readHash()) home();
}

async function get(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 400));
  return answer;
}

async function loadSlide({level, column, row}) {
  const answer = await get(`slide/${level}/${column}/${row}`);
  return createImageBitmap(await answer.blob());
}

async function loadMask({level, column, row, width, height}) {
  const answer = await get(`mask/${level}/${column}/${row}`);
  const labels = new Uint8Array(await answer.arrayBuffer());
  if (labels.length !== width * height) throw new Error("A tile of the mask has the wrong size");
  return {labels, version: -1, picture: null};
}

// ---- drawing -------------------------------------------------------------------------------

const dense = () => window.devicePixelRatio || 1;

function box() {
  const [w, h] = [canvas.clientWidth / state.scale / 2, canvas.clientHeight / state.scale / 2];
  return {left: state.x - w, right: state.x + w, top: state.y - h, bottom: state.y + h};
}

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    render();
  });
}

function render() {
  const context = canvas.getContext("2d", {alpha: false});
  const view = box(), zoom = state.scale * dense();
  context.fillStyle = "#e3e5e8";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const whole = place({left: 0, top: 0, right: info.size[0], bottom: info.size[1]}, view, zoom);
  context.fillStyle = "#ffffff";
  context.fillRect(...whole);
  context.imageSmoothingQuality = "high";
  for (const tile of slide.visible(zoom, view)) {
    const at = place(tile, view, zoom);
    context.imageSmoothingEnabled = true;
    if (tile.content) context.drawImage(tile.content, ...at);
    else drawBroken(context, at);
  }
  if (state.mask && mask.levels.length) drawMask(context, view, zoom, whole);
  drawBar();
  saveHash();
  document.body.dataset.state = slide.idle && mask.idle ? "idle" : "loading";
}

/** [x, y, width, height] in whole device pixels, so that neighbours meet without a seam. */
function place(tile, view, zoom) {
  const [x, y] = [Math.round((tile.left - view.left) * zoom), Math.round((tile.top - view.top) * zoom)];
  return [x, y, Math.round((tile.right - view.left) * zoom) - x,
    Math.round((tile.bottom - view.top) * zoom) - y];
}

function drawMask(context, view, zoom, whole) {
  const own = layer.getContext("2d");
  own.clearRect(0, 0, layer.width, layer.height);
  own.imageSmoothingEnabled = false;
  for (const tile of mask.visible(zoom, view)) {
    const at = place(tile, view, zoom);
    own.clearRect(...at); // a finer tile replaces what is coarser
    if (tile.content) own.drawImage(picture(tile), ...at);
    else drawBroken(own, at);
  }
  context.save();
  context.beginPath();
  context.rect(...whole);
  context.clip();
  context.globalAlpha = opacities[state.outline ? "outline" : "fill"] / 100;
  context.drawImage(layer, 0, 0);
  context.restore();
}

function picture({content, width, height}) {
  if (content.version !== state.version) {
    content.picture = paint(content.labels, width, height, colours, state.outline);
    content.version = state.version;
  }
  return content.picture;
}

function drawBroken(context, [x, y, width, height]) {
  context.fillStyle = "#b9bec5";
  context.fillRect(x, y, width, height);
  context.fillStyle = "#1c2026";
  context.font = `${13 * dense()}px sans-serif`;
  if (width > 120 * dense()) context.fillText("cannot be read", x + 8 * dense(), y + 20 * dense());
}

function drawBar() {
  find("bar").hidden = !info.mpp;
  if (!info.mpp) return;
  const um = 140 / state.scale * info.mpp; // at most 140 screen pixels
  const power = 10 ** Math.floor(Math.log10(um));
  const length = power * [5, 2, 1].find((step) => step * power <= um);
  find("bar-line").style.width = `${length * state.scale / info.mpp}px`;
  find("bar-text").textContent = length < 1000 ? `${+length.toPrecision(3)} µm`
    : `${+(length / 1000).toPrecision(3)} mm`;
}

// ---- moving --------------------------------------------------------------------------------

function limits() {
  const fit = Math.min(canvas.clientWidth / info.size[0], canvas.clientHeight / info.size[1]);
  return {fit: 0.95 * fit, least: 0.4 * fit, most: Math.max(16, fit)};
}

function home() {
  state.x = info.size[0] / 2;
  state.y = info.size[1] / 2;
  state.scale = limits().fit;
  draw();
}

function move(dx, dy) {
  const keep = (value, most) => Math.min(Math.max(value, 0), most);
  state.x = keep(state.x - dx / state.scale, info.size[0]);
  state.y = keep(state.y - dy / state.scale, info.size[1]);
  draw();
}

/** Zoom by a factor so that what is under (px, py) of the canvas stays there. */
function zoomBy(factor, px = canvas.clientWidth / 2, py = canvas.clientHeight / 2) {
  const {least, most} = limits();
  const old = state.scale;
  state.scale = Math.min(Math.max(old * factor, least), most);
  const shift = 1 / old - 1 / state.scale;
  state.x += (px - canvas.clientWidth / 2) * shift;
  state.y += (py - canvas.clientHeight / 2) * shift;
  move(0, 0);
}

function resize() {
  for (const one of [canvas, layer]) {
    one.width = Math.max(1, Math.round(canvas.clientWidth * dense()));
    one.height = Math.max(1, Math.round(canvas.clientHeight * dense()));
  }
  draw();
}

function readHash() {
  const named = new URLSearchParams(location.hash.slice(1));
  const [x, y, scale] = ["x", "y", "scale"].map((k) => parseFloat(named.get(k)));
  if (!(Number.isFinite(x) && Number.isFinite(y) && scale > 0)) return false;
  Object.assign(state, {x, y, scale});
  zoomBy(1);
  return true;
}

let saving;
function saveHash() {
  clearTimeout(saving);
  saving = setTimeout(() => history.replaceState(null, "",
    `#x=${state.x.toFixed(1)}&y=${state.y.toFixed(1)}&scale=${state.scale.toPrecision(5)}`), 300);
}

// ---- input ---------------------------------------------------------------------------------

function listen() {
  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("moving");
    fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => {
      fingers.delete(event.pointerId);
      canvas.classList.toggle("moving", fingers.size > 0);
    });
  }
  canvas.addEventListener("pointermove", (event) => {
    point(event);
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.offsetX, event.offsetY];
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, now);
    if (!other) move(now[0] - before[0], now[1] - before[1]);
    else zoomBy(distance(now, other) / Math.max(1, distance(before, other)), ...other);
  });
  canvas.addEventListener("pointerleave", () => { find("place").textContent = ""; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 30 : 1;
    zoomBy(2 ** (-event.deltaY * lines / (event.ctrlKey ? 100 : 300)), event.offsetX, event.offsetY);
  }, {passive: false});
  canvas.addEventListener("dblclick", (event) => zoomBy(2, event.offsetX, event.offsetY));
  document.addEventListener("keydown", press);
  window.addEventListener("hashchange", readHash);
  find("in").addEventListener("click", () => zoomBy(2));
  find("out").addEventListener("click", () => zoomBy(0.5));
  find("home").addEventListener("click", home);
  find("opacity").addEventListener("input", opacity);
  find("mask").addEventListener("change", () => { state.mask = find("mask").checked; draw(); });
  document.querySelectorAll("[name=mode]").forEach((radio) => radio.addEventListener("change", () => {
    state.outline = radio.value === "outline";
    find("opacity").value = opacities[radio.value];
    opacity();
    recolour();
  }));
  opacity();
}

const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);

function opacity() {
  opacities[state.outline ? "outline" : "fill"] = +find("opacity").value;
  find("opacity-text").textContent = `${find("opacity").value}%`;
  draw();
}

function press(event) {
  if (event.target.matches("input, button, a") || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {"+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: home,
    ArrowLeft: () => move(80, 0), ArrowRight: () => move(-80, 0), ArrowUp: () => move(0, 80),
    ArrowDown: () => move(0, -80), " ": () => find("mask").click()};
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

/** Say where the pointer is and what the mask holds there. */
function point(event) {
  const view = box();
  const [x, y] = [view.left + event.offsetX / state.scale, view.top + event.offsetY / state.scale];
  const inside = x >= 0 && y >= 0 && x < info.size[0] && y < info.size[1];
  find("place").textContent = inside ? `${label(x, y)}   x ${Math.floor(x)}  y ${Math.floor(y)} px` : "";
}

function label(x, y) {
  const tile = mask.at(state.scale * dense(), x, y);
  if (!tile) return mask.levels.length ? "" : "no mask";
  const [dx, dy] = mask.levels[tile.level].downsample;
  const column = Math.min(tile.width - 1, Math.floor((x - tile.left) / dx));
  const row = Math.min(tile.height - 1, Math.floor((y - tile.top) / dy));
  const value = tile.content.labels[row * tile.width + column];
  return info.classes.find((c) => c.value === value)?.name ?? "not analysed";
}

// ---- the panel -----------------------------------------------------------------------------

function recolour() {
  colours = palette(info.classes, shown);
  state.version += 1;
  draw();
}

function complain(text) {
  if (complaints.has(text)) return;
  complaints.add(text);
  find("problems").append(element("p", {textContent: text}));
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function fillNavigation() {
  if (info.number > 0) find("previous").href = `../${info.number - 1}/`;
  if (info.number < info.count - 1) find("next").href = `../${info.number + 1}/`;
}

function fillClasses() {
  const total = info.classes.reduce((sum, c) => sum + (c.mm2 ?? 0), 0);
  for (const one of info.classes) {
    const box = element("input", {type: "checkbox", checked: shown.has(one.value)});
    box.addEventListener("change", () => {
      if (box.checked) shown.add(one.value);
      else shown.delete(one.value);
      recolour();
    });
    const swatch = element("i", {className: "swatch"});
    swatch.style.background = `rgb(${one.color.join(" ")})`;
    const name = element("label", {}, swatch, one.name);
    box.id = `class-${one.value}`;
    name.htmlFor = box.id;
    const count = one.objects == null ? [] : [element("small", {textContent: `${one.objects} objects`})];
    const share = total && one.mm2 != null ? (100 * one.mm2 / total).toFixed(1) : "–";
    find("classes").tBodies[0].append(element("tr", {}, element("td", {}, box),
      element("td", {}, name, ...count), element("td", {textContent: one.mm2?.toFixed(3) ?? "–"}),
      element("td", {textContent: share})));
  }
}

function fillFacts() {
  const [w, h] = info.size ?? [];
  const mm = (px) => (px * info.mpp / 1000).toFixed(2);
  const facts = {
    Status: info.status,
    Size: w && `${w} × ${h} px`,
    Extent: w && info.mpp && `${mm(w)} × ${mm(h)} mm`,
    Pixel: info.mpp && `${+info.mpp.toPrecision(4)} µm`,
    "Mask pixel": info.mask_mpp && `${+info.mask_mpp[0].toPrecision(4)} µm`,
    Tissue: info.tissue,
    Model: info.model && `${info.model} ${info.model_sha256.slice(0, 12)}`,
    Licence: info.licence,
  };
  for (const [name, value] of Object.entries(facts)) {
    if (!value) continue;
    find("facts").append(element("dt", {textContent: name}), element("dd", {textContent: value}));
  }
}
