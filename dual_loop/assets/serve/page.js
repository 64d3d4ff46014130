/* The page of `dual-loop serve`. The server keeps nothing: picture, marks and regions are here and go with each question.

A mask is {canvas, bits}: white where the object is and clear elsewhere, and the same as 0 and 1; both of the picture's
working size, which is at most `side` a side, so that a large photograph is asked about as fast as a small one. */
"use strict";

const $ = (id) => document.getElementById(id);
const { side: SIDE, regions: MOST, boxes: BOXES } = document.body.dataset;
const GIVEN = "#ff8c00", BACK = "#00aaff";
const LOSSLESS = 512 * 512; // pixels up to which a picture is sent as PNG
const HINTS = {
  click: "Click an object: SAM 2 draws its outline. Further clicks add to it.",
  box: BOXES === "sam2" ? "Drag a box: SAM 2 draws the object in it."
    : "Drag a box: its whole area is the region, for this model's SAM 2 has not learned boxes.",
  brush: "Paint over an object.",
  eraser: "Wipe away what is marked too much.",
};

/* `picture` is null or {canvas, name, width, height, url}: its sides are those of the file. Nothing in `now` is changed
in place, so that a step back is another `now`. */
let now = { picture: null, marks: [], regions: [], chosen: -1 };
let past = [];
let tool = "click";
let drag = null; // {from, to} of a box, or the stroke that is being drawn
let cursor = null; // of the arrow keys, and `corner` the first one of a box
let corner = null;
let busy = 0;
let asked = 0; // counts what makes an answer to an edited caption late

/* ---- masks ---- */

function newCanvas(width, height, source) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (source) context.drawImage(source, 0, 0, width, height);
  return canvas;
}

const size = () => [now.picture.canvas.width, now.picture.canvas.height];

/* Make a mask of a canvas that is clear, or black, where there is nothing. */
function maskOf(canvas) {
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const bits = new Uint8Array(canvas.width * canvas.height);
  const values = new Uint32Array(pixels.data.buffer);
  for (let at = 0; at < bits.length; at++) {
    bits[at] = pixels.data[4 * at] > 127 && pixels.data[4 * at + 3] > 127 ? 1 : 0;
    values[at] = bits[at] ? 0xffffffff : 0;
  }
  context.putImageData(pixels, 0, 0);
  return { canvas, bits };
}

async function readMask(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return maskOf(newCanvas(...size(), image));
}

function maskUrl(mask, width = mask.canvas.width, height = mask.canvas.height) {
  return onBlack(mask, width, height).toDataURL("image/png");
}

function onBlack(mask, width, height) {
  const canvas = newCanvas(width, height, mask.canvas);
  const context = canvas.getContext("2d");
  for (let top = 0; top < height; top += 256) { // in strips: a large photograph has 50 MB of pixels
    const strip = context.getImageData(0, top, width, Math.min(256, height - top));
    const values = new Uint32Array(strip.data.buffer);
    for (let at = 0; at < values.length; at++) values[at] = strip.data[4 * at + 3] > 127 ? 0xffffffff : 0xff000000;
    context.putImageData(strip, 0, top);
  }
  return canvas;
}

function iou(first, second) {
  first.ious ??= new Map();
  if (first.ious.has(second)) return first.ious.get(second);
  let both = 0, either = 0;
  for (let at = 0; at < first.bits.length; at++) {
    both += first.bits[at] & second.bits[at];
    either += first.bits[at] | second.bits[at];
  }
  first.ious.set(second, either ? both / either : 0);
  return first.ious.get(second);
}

const masksOfMarks = new WeakMap();

/* Return the mask of all marks; it may be empty. */
function marked() {
  const { marks } = now;
  if (!masksOfMarks.has(marks)) {
    const layer = newCanvas(...size());
    for (const mark of marks) drawMark(layer.getContext("2d"), mark);
    masksOfMarks.set(marks, maskOf(layer));
  }
  return masksOfMarks.get(marks);
}

function drawMark(context, mark) {
  context.globalCompositeOperation = mark.erases ? "destination-out" : "source-over";
  if (mark.mask) return context.drawImage(mark.mask.canvas, 0, 0);
  Object.assign(context, { strokeStyle: "#fff", lineWidth: mark.width, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  const [x, y] = mark.points[0];
  context.moveTo(x - 0.01, y); // a line without length is not drawn
  for (const point of mark.points) context.lineTo(...point);
  context.stroke();
}

/* ---- drawing ---- */

/* Fill a mask so that the object stays visible below, with an outline that shows on any colour. */
function drawMask(context, mask, colour, fill) {
  const { width, height } = context.canvas, key = `${width} ${colour} ${fill}`;
  mask.drawn ??= new Map();
  if (!mask.drawn.has(key)) mask.drawn.set(key, overlay(mask.canvas, width, height, colour, fill));
  context.drawImage(mask.drawn.get(key), 0, 0);
}

function overlay(mask, width, height, colour, fill) {
  const small = newCanvas(width, height, mask), all = newCanvas(width, height), context = all.getContext("2d");
  const line = Math.max(width, height) / 400;
  for (const [reach, style] of [[1.6 * line, "#fff"], [line, colour]]) {
    const edge = newCanvas(width, height), brush = edge.getContext("2d");
    for (const [x, y] of [[1, 0], [-1, 0], [0, 1], [0, -1], [0.7, 0.7], [-0.7, 0.7], [0.7, -0.7], [-0.7, -0.7]])
      brush.drawImage(small, reach * x, reach * y);
    context.drawImage(tinted(edge, style), 0, 0);
  }
  context.globalCompositeOperation = "destination-out";
  context.drawImage(small, 0, 0);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = fill;
  context.drawImage(tinted(small, colour), 0, 0);
  return all;
}

function tinted(canvas, colour) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

function fitted(canvas, long) {
  const [width, height] = size(), scale = long / Math.max(width, height);
  Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
  const context = canvas.getContext("2d");
  context.drawImage(now.picture.canvas, 0, 0, canvas.width, canvas.height);
  return context;
}

function draw() {
  const stage = $("canvas"), region = now.regions[now.chosen];
  stage.hidden = !now.picture;
  if (!now.picture) return;
  const room = $("stage").getBoundingClientRect(), [width, height] = size();
  const shown = Math.min((room.width - 2) / width, (room.height - 2) / height);
  const context = fitted(stage, Math.max(width, height) * shown * devicePixelRatio), scale = stage.width / width;
  Object.assign(stage.style, { width: `${width * shown}px`, height: `${height * shown}px` });
  if (now.marks.length) drawMask(context, marked(), GIVEN, 0.35);
  else if (region && !drag?.points) {
    if (region.back) drawMask(context, region.back, BACK, 0.3);
    if (region.given) drawMask(context, region.given, GIVEN, 0);
  }
  if (drag?.points) { // the stroke alone; its outline is drawn when it is done
    const layer = newCanvas(stage.width, stage.height), brush = layer.getContext("2d");
    brush.scale(scale, scale);
    drawMark(brush, { ...drag, erases: false });
    context.globalAlpha = 0.5;
    context.drawImage(tinted(layer, drag.erases ? "#fff" : GIVEN), 0, 0);
    context.globalAlpha = 1;
  }
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const line = 1 / shown;
  for (const style of ["#000", "#fff"]) {
    Object.assign(context, { strokeStyle: style, lineWidth: style === "#000" ? 2 * line : line });
    const from = drag && drag.from || corner, to = drag && drag.to || cursor;
    if (from && to) context.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
    if (!cursor) continue;
    const reach = isStroke() ? brushWidth() / 2 : 6 * line;
    context.beginPath();
    context.arc(...cursor, reach, 0, 2 * Math.PI);
    context.stroke();
  }
}

function show() {
  const region = now.regions[now.chosen], isReady = !busy && now.picture;
  draw();
  for (const name of Object.keys(HINTS)) $(name).setAttribute("aria-pressed", name === tool);
  document.body.classList.toggle("strokes", isStroke());
  document.body.classList.toggle("drags", tool !== "click");
  $("hint").textContent = HINTS[tool];
  $("describe").disabled = !isReady || !now.marks.length;
  $("undo").disabled = busy || !past.length;
  $("clear").disabled = busy || !(now.marks.length || now.regions.length);
  $("find").querySelector("button").disabled = !isReady;
  $("list").replaceChildren(...now.regions.map((one, place) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: one.name });
    button.setAttribute("aria-pressed", place === now.chosen);
    button.onclick = () => choose(place);
    return button;
  }));
  const words = region ? region.caption : "";
  if ($("caption").value !== words) $("caption").value = words;
  $("caption").disabled = !region;
  let score = "\u00a0";
  if (region && region.given) score = `IoU ${(region.back ? iou(region.back, region.given) : 0).toFixed(3)}`;
  if (region && !region.given) score = region.back ? "found" : "nothing found";
  if (region && region.rejected) score += ` (caption not usable: ${region.rejected})`;
  $("iou").textContent = score;
  for (const [id, colour] of [["given", GIVEN], ["back", BACK]]) {
    const mask = region && region[id];
    $(`save_${id}`).disabled = !mask;
    $(id).parentElement.className = mask ? "" : "none";
    const context = now.picture ? fitted($(id), 480) : null;
    if (mask) drawMask(context, mask, colour, 0.4);
    if (id === "back" && region && region.given) drawMask(context, region.given, GIVEN, 0);
  }
  $("save_caption").disabled = $("save_json").disabled = !region;
  showMatrix();
}

function matrix() {
  const given = now.regions.filter((one) => one.given);
  return now.regions.map((one) => given.map((other) => (one.back ? iou(one.back, other.given) : 0)));
}

function showMatrix() {
  const given = now.regions.filter((one) => one.given);
  $("compare").hidden = now.regions.length < 2 || !given.length;
  if ($("compare").hidden) return;
  const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  const head = document.createElement("tr");
  head.append(cell("th", "caption \\ region"), ...given.map((one) => cell("th", one.name)));
  const rows = matrix().map((values, place) => {
    const row = document.createElement("tr");
    row.append(cell("th", `“${now.regions[place].caption}”`), ...values.map((value, column) => {
      const box = cell("td", value.toFixed(2));
      box.style.background = `rgba(0,150,220,${(0.65 * value).toFixed(2)})`;
      box.classList.toggle("own", given[column] === now.regions[place]);
      return box;
    }));
    return row;
  });
  $("matrix").replaceChildren(head, ...rows);
}

/* ---- state ---- */

function change(changes) {
  past = [...past.slice(-49), now];
  now = { ...now, ...changes };
  show();
}

function undo() {
  if (busy || !past.length) return;
  now = past.pop();
  asked++;
  say("One step back.");
  show();
}

function choose(place) {
  now = { ...now, chosen: place };
  show();
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

/* Put a question to the server; null where it was answered by an error, or for another picture than the present one. */
async function ask(path, question, what, locks = 1) {
  const { picture } = now, started = performance.now();
  const tell = () => say(`${what} … ${Math.floor((performance.now() - started) / 1000)} s`);
  const clock = setInterval(tell, 1000);
  busy += locks;
  say(`${what} …`);
  show();
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(question) });
    const found = await answer.json().catch(() => ({ error: `the server says ${answer.status}` }));
    if (!answer.ok) throw new Error(found.error);
    if (picture === now.picture) return found;
  } catch (error) {
    say(`Error: ${error instanceof TypeError ? "the server does not answer; is it running?" : error.message}`, true);
  } finally {
    clearInterval(clock);
    busy -= locks;
    show();
  }
  return null;
}

const seconds = (started) => `${((performance.now() - started) / 1000).toFixed(1)} s`;

/* ---- 1: a picture ---- */

async function openPicture(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`Error: ${name} is no picture that this browser can open.`, true);
  }
  const { width, height } = bitmap, scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = newCanvas(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const isSmall = canvas.width * canvas.height <= LOSSLESS;
  const url = isSmall ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.95);
  cursor = corner = null;
  const isFirst = !now.picture;
  change({ picture: { canvas, name, width, height, url }, marks: [], regions: [], chosen: -1 });
  if (isFirst) past = [];
  asked++;
  show();
  say(`${name}: ${width} × ${height}. Mark an object, or name it.`);
}

/* ---- 2: marks and words ---- */

async function addObject(question, what) {
  if (busy) return;
  const found = await ask("region", { image: now.picture.url, ...question }, what);
  if (!found) return;
  change({ marks: [...now.marks, { mask: await readMask(found.mask) }] });
  say("Marked. Add to it, undo, or describe it.");
}

const onPoint = (point) => addObject({ point }, "SAM 2 looks for the object");

function onBox(from, to) {
  const [width, height] = size();
  const bound = (value, most) => Math.min(Math.max(value, 0), most);
  const [x1, x2] = [from[0], to[0]].sort((a, b) => a - b).map((x) => bound(x, width));
  const [y1, y2] = [from[1], to[1]].sort((a, b) => a - b).map((y) => bound(y, height));
  if (x2 - x1 >= 1 && y2 - y1 >= 1) addObject({ box: [x1, y1, x2, y2] }, "The box is read");
}

async function describe(masks = now.picture && [marked()], names = []) {
  if (busy || !now.picture) return;
  if (!masks[0].bits.includes(1)) return say("Error: no object is marked.", true);
  if (now.regions.length + masks.length > MOST)
    return say(`Error: at most ${MOST} regions; undo, or start over.`, true);
  const started = performance.now();
  const question = { image: now.picture.url, masks: masks.map((one) => maskUrl(one)) };
  const found = await ask("loop", question, "Reading and drawing");
  if (!found) return;
  const first = now.regions.length + 1;
  const regions = await Promise.all(found.regions.map(async ({ caption, rejected, mask }, place) => ({
    name: names[place] ? `${first + place}: ${names[place]}` : `region ${first + place}`,
    given: masks[place], caption, rejected, back: await readMask(mask),
  })));
  const isFound = regions.at(-1).back.bits.includes(1);
  const leads = isFound ? "Blue is what the caption leads back to." : "The caption leads to nothing.";
  showResult(regions, `Described in ${seconds(started)}. ${leads}`);
}

async function find(text) {
  if (busy || !now.picture) return;
  if (!text) return say("Error: say what to look for, as: the red star", true);
  if (now.regions.length >= MOST) return say(`Error: at most ${MOST} regions; undo, or start over.`, true);
  const started = performance.now();
  const found = await ask("segment", { image: now.picture.url, text }, "Looking for it");
  if (!found) return;
  const back = found.pixels ? await readMask(found.mask) : null;
  const region = { name: `text ${now.regions.length + 1}`, given: null, caption: text, rejected: null, back };
  showResult([region], back ? `Found in ${seconds(started)}.` : "Nothing was found by these words.");
}

function showResult(regions, text) {
  change({ regions: [...now.regions, ...regions], marks: [], chosen: now.regions.length + regions.length - 1 });
  say(text);
  if ($("pair").getBoundingClientRect().bottom > innerHeight - $("status").offsetHeight) {
    const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("result").scrollIntoView({ behavior: isCalm ? "auto" : "smooth", block: "start" });
  }
}

async function addMaskFiles(files) {
  if (!now.picture) return;
  const masks = [], names = [];
  for (const file of files) {
    const data = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.split(",")[1] || "");
      reader.readAsDataURL(file);
    });
    const { width, height } = now.picture;
    const found = await ask("masks", { name: file.name, data, width, height }, `Reading ${file.name}`);
    if (!found) return;
    for (const one of found.masks) {
      masks.push(await readMask(one.mask));
      names.push(one.name);
    }
  }
  await describe(masks, names);
}

/* ---- 3: the caption ---- */

let waiting = 0;
let isEditing = false; // one step back takes all that was typed in one go

function onEdit() {
  const place = now.chosen, text = $("caption").value, mine = ++asked;
  const edit = (changes) => {
    const regions = now.regions.map((one, number) => (number === place ? { ...one, ...changes } : one));
    now = { ...now, regions };
    show();
  };
  if (!isEditing) past = [...past.slice(-49), now];
  isEditing = true;
  edit({ caption: text, rejected: null });
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    if (mine !== asked) return;
    const question = { image: now.picture.url, text: text.trim() };
    const found = text.trim() ? await ask("segment", question, "The mask follows", 0) : {};
    const back = found?.pixels ? await readMask(found.mask) : null;
    if (mine !== asked) return; // a later word was typed, or this one was taken back
    edit({ back });
    if (found) say(back ? "The mask follows the caption." : "Nothing was found by these words.");
  }, 300);
}

/* ---- downloads ---- */

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${now.picture.name.replace(/\.[^.]*$/, "")}_${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

const ending = (id) => `${now.regions[now.chosen].name.replace(/[^\w.-]+/g, "_")}_${id}.png`;

function saveMask(id) {
  const mask = now.regions[now.chosen][id], { width, height } = now.picture;
  onBlack(mask, width, height).toBlob((blob) => {
    if (blob) save(blob, ending(id));
    else onBlack(mask, ...size()).toBlob((small) => save(small, ending(id))); // more pixels than this browser draws
  });
}

function saveJson() {
  const values = matrix(), given = now.regions.filter((one) => one.given), { name, width, height } = now.picture;
  const round = (value) => Math.round(value * 1e4) / 1e4;
  const regions = now.regions.map((one, place) => ({
    region: one.name, caption: one.caption, rejected: one.rejected,
    iou: one.given ? round(values[place][given.indexOf(one)]) : null,
    iou_with_each: values[place].map(round),
    given: one.given && maskUrl(one.given, width, height), mask: one.back && maskUrl(one.back, width, height),
  }));
  const text = JSON.stringify({ image: name, width, height, regions }, null, 2);
  save(new Blob([text]), "regions.json");
}

/* ---- pointer and keyboard ---- */

const isStroke = () => tool === "brush" || tool === "eraser";

/* From a two-hundredth to a half of the picture's longer side: a pixel-wide thread, or a sky in one stroke. */
const brushWidth = () => Math.max(...size()) * 0.005 * 100 ** ($("width").value / 100);

function chooseTool(name) {
  tool = name;
  drag = corner = null;
  show();
}

function at(event) {
  const box = $("canvas").getBoundingClientRect(), [width, height] = size();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height].map(
    (value) => Math.round(10 * value) / 10);
}

const stroke = (points) => ({ points, width: brushWidth(), erases: tool === "eraser" });

$("canvas").addEventListener("pointerdown", (event) => {
  if (event.button || busy) return;
  cursor = corner = null;
  $("canvas").setPointerCapture(event.pointerId);
  drag = isStroke() ? stroke([at(event)]) : { from: at(event), to: null };
  draw();
});
$("canvas").addEventListener("pointermove", (event) => {
  if (!drag) return;
  if (drag.points) drag.points.push(...(event.getCoalescedEvents?.() || [event]).map(at));
  else if (tool === "box") drag.to = at(event);
  requestAnimationFrame(draw);
});
$("canvas").addEventListener("pointerup", (event) => {
  const done = drag;
  drag = null;
  if (!done) return;
  if (done.points) change({ marks: [...now.marks, done] });
  else if (tool === "box") onBox(done.from, at(event));
  else onPoint(done.from);
});
$("canvas").addEventListener("pointercancel", () => { drag = null; draw(); });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

$("stage").addEventListener("keydown", (event) => {
  if (!now.picture || busy || event.ctrlKey || event.metaKey) return;
  const [width, height] = size();
  if (STEPS[event.key]) {
    const reach = Math.max(width, height) * (event.shiftKey ? 0.1 : 0.02);
    const [x, y] = cursor || [width / 2, height / 2], [right, down] = STEPS[event.key];
    cursor = [Math.min(Math.max(x + right * reach, 0), width), Math.min(Math.max(y + down * reach, 0), height)];
    draw();
  } else if (event.key === " ") {
    const spot = cursor = cursor || [width / 2, height / 2];
    if (isStroke()) change({ marks: [...now.marks, stroke([spot])] });
    else if (tool === "click") onPoint(spot);
    else if (corner) [corner] = [null, onBox(corner, spot)];
    else corner = spot;
    draw();
  } else return;
  event.preventDefault();
});
$("stage").addEventListener("blur", () => { cursor = corner = null; draw(); });

const KEYS = { c: "click", x: "box", b: "brush", e: "eraser" };

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("textarea, input:not([type=range]):not([type=file])");
  if (isTyping || event.altKey) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (key !== "z") return;
    undo();
  } else if (KEYS[key]) chooseTool(KEYS[key]);
  else if (key === "[" || key === "]") {
    $("width").value = +$("width").value + (key === "]" ? 5 : -5);
    draw();
  } else if (key === "t") $("text").focus();
  else if (key === "enter" && !event.target.matches("button, summary, a, input")) describe();
  else if (now.regions[key - 1]) choose(key - 1);
  else return;
  event.preventDefault();
});

for (const name of Object.keys(HINTS)) $(name).onclick = () => chooseTool(name);
for (const button of $("examples").children) {
  button.onclick = async () => {
    const answer = await fetch(button.firstElementChild.src).catch(() => null);
    if (!answer?.ok) return say("Error: the server does not answer; is it running?", true);
    await openPicture(await answer.blob(), button.getAttribute("aria-label"));
  };
}
for (const [id, use] of [["open", ([file]) => file && openPicture(file, file.name)], ["masks", addMaskFiles]]) {
  $(id).onchange = () => {
    const files = [...$(id).files];
    $(id).value = ""; // so that the same file can be chosen again
    use(files);
  };
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) openPicture(file, "pasted picture");
});
document.addEventListener("dragover", (event) => { event.preventDefault(); $("stage").classList.add("drop"); });
document.addEventListener("dragleave", () => $("stage").classList.remove("drop"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("drop");
  const [file] = event.dataTransfer.files;
  if (file) openPicture(file, file.name);
});
$("describe").onclick = () => describe();
$("undo").onclick = undo;
$("clear").onclick = () => {
  asked++;
  change({ marks: [], regions: [], chosen: -1 });
  say("Nothing is marked.");
};
$("find").onsubmit = (event) => { event.preventDefault(); find($("text").value.trim()); };
$("caption").oninput = onEdit;
$("caption").onblur = () => { isEditing = false; };
$("save_given").onclick = () => saveMask("given");
$("save_back").onclick = () => saveMask("back");
$("save_caption").onclick = () => save(new Blob([`${now.regions[now.chosen].caption}\n`]), "caption.txt");
$("save_json").onclick = saveJson;
$("width").oninput = () => draw();
addEventListener("resize", draw);

show();
$("examples").firstElementChild?.click();
