// The panel #trial: an image or a drawing becomes the input of the packed models as #data says, and ONNX Runtime Web
// computes their answers beside those of the float model. Tells of each answer by an event "answered" on the panel, with
// the input and the logits.
"use strict";
const { preparation, classes, models, floats, samples } = JSON.parse(document.getElementById("data").textContent);
const [panel, pad, seen, answers, status] =
  ["panel", "pad", "seen", "answers", "status"].map((name) => document.getElementById("trial-" + name));
const { channels, height, width, drawn } = preparation;
const CELLS = 8, SHOWN = 5, BOX = 32;  // the digits are counts of ink in 4×4 squares of 32×32 pixels

// ---------------------------------------------------------------------------------------------------------- the models

const sessions = new Map();
let prepared;

async function bytesOf(name) {
  const element = document.getElementById("blob-" + name);
  const packed = Uint8Array.from(atob(element.textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function prepare() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await bytesOf("runtime")).buffer;
}

// The logits of a model, and the milliseconds of its second run: the first one allocates.
async function run(name, input) {
  prepared ??= prepare();
  await prepared;
  const fresh = !sessions.has(name);
  if (fresh) sessions.set(name, await ort.InferenceSession.create(await bytesOf(name), { executionProviders: ["wasm"] }));
  const images = new ort.Tensor("float32", input, [1, channels, height, width]);
  if (fresh) await sessions.get(name).run({ images });
  const start = performance.now();
  const { logits } = await sessions.get(name).run({ images });
  return { logits: Array.from(logits.data), time: performance.now() - start };
}

// ---------------------------------------------------------------------------------------------- from images to the input

const KERNELS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const t = Math.abs(x), a = -0.5;
    if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
    return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
  }],
};

// Weights of the pixels that each new pixel is made of, as Pillow has them: the kernel widens where an image shrinks.
function weightsOf(before, after) {
  const [reach, kernel] = KERNELS[preparation.interpolation];
  const scale = before / after, wide = Math.max(scale, 1), support = reach * wide;
  return Array.from({ length: after }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(before, Math.trunc(centre + support + 0.5));
    const own = Array.from({ length: end - first }, (_, x) => kernel((x + first - centre + 0.5) / wide));
    const total = own.reduce((sum, one) => sum + one, 0);
    return [first, own.map((one) => one / total)];
  });
}

// A plane resized along its rows, transposed: twice makes both sides. Photographs are rounded to bytes each time, with
// weights of 22 bits, as Pillow does.
function alongRows({ values, rows, columns }, after, rounded) {
  const ONE = 2 ** 22, result = new Float64Array(after * rows);
  const weights = after === columns ? null : weightsOf(columns, after);
  for (let x = 0; x < after; x++) {
    const [first, exact] = weights ? weights[x] : [x, [1]];
    const own = rounded ? exact.map((one) => Math.trunc(one * ONE + (one < 0 ? -0.5 : 0.5))) : exact;
    for (let y = 0; y < rows; y++) {
      let sum = 0;
      for (let k = 0; k < own.length; k++) sum += own[k] * values[y * columns + first + k];
      result[x * rows + y] = rounded ? Math.min(255, Math.max(0, Math.floor(sum / ONE + 0.5))) : sum;
    }
  }
  return { values: result, rows: after, columns: rows };
}

const resized = (plane, rows, columns, rounded) => alongRows(alongRows(plane, columns, rounded), rows, rounded);

const toEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// The middle of a plane; black where it is smaller.
function centre({ values, rows, columns }) {
  const offset = (have, want) => (have < want ? -Math.floor((want - have) / 2) : toEven((have - want) / 2));
  const top = offset(rows, height), left = offset(columns, width), result = new Float64Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [row, column] = [y + top, x + left];
      const inside = row >= 0 && row < rows && column >= 0 && column < columns;
      result[y * width + x] = inside ? values[row * columns + column] : 0;
    }
  }
  return result;
}

// Planes (0..1) as the input of the model; one plane is repeated for all channels.
function normalized(planes) {
  const input = new Float32Array(channels * height * width);
  for (let c = 0; c < channels; c++) {
    const plane = planes[c] || planes[0];
    plane.forEach((value, i) => {
      input[c * height * width + i] = (value - preparation.mean[c]) / preparation.std[c];
    });
  }
  return { input, planes };
}

function pixelsOf(image, columns = image.width, rows = image.height) {
  const canvas = new OffscreenCanvas(columns, rows), context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, columns, rows);
  return context.getImageData(0, 0, columns, rows);
}

const grey = (r, g, b) => Math.floor((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536);

function fromPhotograph(image) {
  const { data, width: columns, height: rows } = pixelsOf(image);
  const planes = Array.from({ length: channels }, () => new Float64Array(columns * rows));
  for (let i = 0; i < columns * rows; i++) {
    const colour = data.subarray(4 * i, 4 * i + 3);
    if (channels === 1) planes[0][i] = grey(...colour);
    else planes.forEach((plane, c) => { plane[i] = colour[c]; });
  }
  const [short, other] = preparation.resize, longer = (side) => Math.floor((short * side) / Math.min(rows, columns));
  const size = other !== undefined ? [short, other] : rows <= columns ? [short, longer(columns)] : [longer(rows), short];
  return normalized(planes.map((values) =>
    centre(resized({ values, rows, columns }, ...size, true)).map((value) => value / 255)));
}

function fromCodes(codes) {
  const plane = { values: codes.map((code) => code / 16), rows: CELLS, columns: CELLS };
  return normalized([resized(plane, height, width, false).values]);
}

// What `draw` puts on a canvas of 32×32 pixels as 8×8 counts of 0..16, which is how the scans were made.
function counted(draw) {
  const context = new OffscreenCanvas(BOX, BOX).getContext("2d", { willReadFrequently: true });
  draw(context);
  const { data } = context.getImageData(0, 0, BOX, BOX), side = BOX / CELLS, sums = new Array(CELLS * CELLS).fill(0);
  for (let i = 0; i < BOX * BOX; i++) {
    const [y, x] = [Math.floor(i / BOX / side), Math.floor((i % BOX) / side)];
    sums[y * CELLS + x] += data[4 * i + 3] / 255;
  }
  return sums.map((sum) => Math.round((sum * 16) / side ** 2));
}

// ------------------------------------------------------------------------------------------------------------- drawings

const PEN = 5, WIDEST = 26;  // of 32 pixels: the scans are as high as their frame, and not as wide
let strokes = [];

// Where the ink between two corners comes to lie in the frame of the scans: (axis, value) → pixel.
function framed(low, high, pen) {
  const tall = Math.max(high[1] - low[1], (high[0] - low[0]) / 3, 1), wide = Math.max(high[0] - low[0], 1);
  const down = (BOX - pen) / tall, scale = [Math.min(down, (WIDEST - pen) / wide), down];
  return (axis, value) => BOX / 2 + (value - (low[axis] + high[axis]) / 2) * scale[axis];
}

function trace(context, pen, place = (_, value) => value) {
  Object.assign(context, { lineWidth: pen, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    context.beginPath();
    for (const [x, y] of [stroke[0], ...stroke]) context.lineTo(place(0, x), place(1, y));
    context.stroke();
  }
}

function fromStrokes() {
  const end = (most) => [0, 1].map((axis) => most(...strokes.flat().map((point) => point[axis])));
  const place = framed(end(Math.min), end(Math.max), PEN);
  return fromCodes(counted((context) => trace(context, PEN, place)));
}

// The image of a digit: its ink is what differs from its border, dark or bright.
function fromPaper(image) {
  const share = Math.min(1, 256 / Math.max(image.width, image.height)), side = (n) => Math.max(1, Math.round(n * share));
  const picture = pixelsOf(image, side(image.width), side(image.height));
  const { data, width: columns, height: rows } = picture, ink = new Float64Array(columns * rows);
  for (let i = 0; i < ink.length; i++) ink[i] = grey(...data.subarray(4 * i, 4 * i + 3));
  const edge = [...ink.subarray(0, columns), ...ink.subarray(-columns)].sort((one, other) => one - other);
  const paper = edge[edge.length >> 1], most = ink.reduce((found, value) => Math.max(found, Math.abs(value - paper)), 1);
  const low = [columns, rows], high = [0, 0];
  for (let i = 0; i < ink.length; i++) {
    const strength = Math.abs(ink[i] - paper) / most, place = [i % columns, Math.floor(i / columns)];
    data[4 * i + 3] = strength > 0.25 ? 255 * strength : 0;
    if (strength > 0.25) place.forEach((value, axis) => {
      low[axis] = Math.min(low[axis], value);
      high[axis] = Math.max(high[axis], value + 1);
    });
  }
  if (high[0] <= low[0]) return fromCodes(new Array(CELLS * CELLS).fill(0));
  const place = framed(low, high, 0), sheet = new OffscreenCanvas(columns, rows);
  sheet.getContext("2d").putImageData(picture, 0, 0);
  return fromCodes(counted((context) => {
    const [left, top, right, bottom] = [place(0, low[0]), place(1, low[1]), place(0, high[0]), place(1, high[1])];
    context.imageSmoothingQuality = "high";
    context.drawImage(sheet, ...low, high[0] - low[0], high[1] - low[1], left, top, right - left, bottom - top);
  }));
}

// ---------------------------------------------------------------------------------------------------------- what is seen

function showInput(planes) {
  seen.width = width;
  seen.height = height;
  const context = seen.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * (planes[c] || planes[0])[i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

const named = (label) => classes[label] ?? `class ${label}`;

function element(kind, text, style) {
  const made = Object.assign(document.createElement(kind), { textContent: text });
  if (style) made.className = style;
  return made;
}

function card(title, { logits, time }) {
  const largest = Math.max(...logits), powers = logits.map((one) => Math.exp(one - largest));
  const total = powers.reduce((sum, one) => sum + one, 0);
  const order = logits.map((_, label) => label).sort((one, other) => logits[other] - logits[one]).slice(0, SHOWN);
  const box = element("div", "", "card"), bars = element("ol", "");
  box.append(element("h3", title), element("p", named(order[0]), "first"), bars);
  for (const label of order) {
    const share = powers[label] / total, line = element("li", ""), bar = element("span", "", "bar");
    bar.style.width = `${100 * share}%`;
    const track = element("span", "", "track");
    track.append(bar);
    line.append(element("span", named(label), "name"), track, element("span", `${(100 * share).toFixed(1)} %`, "share"));
    bars.append(line);
  }
  box.append(element("p", `${time.toFixed(time < 10 ? 1 : 0)} ms`, "muted"));
  return [box, order[0]];
}

let current, waiting = false, busy = false;

// Answers for the current image; while one is computed, the last that came meanwhile waits.
async function answer() {
  if (!current) return;
  showInput(current.planes);
  waiting = true;
  if (busy) return;
  busy = true;
  try {
    while (waiting) {
      waiting = false;
      if (!sessions.size) status.textContent = "Starting ONNX Runtime Web …";
      const shown = current, box = document.getElementById("trial-model"), place = box ? box.selectedIndex : 0;
      const model = models[place], packed = await run(`model-${place}`, shown.input);
      const float = model.beside === null ? null : await run(`float-${model.beside}`, shown.input);
      if (shown !== current) continue;
      const [own, said] = card(`Packed: ${model.name}`, packed);
      answers.replaceChildren(own);
      let verdict = `The packed model answers ${named(said)}`;
      if (float) {
        const [other, expected] = card(`Float: ${floats[model.beside].name}`, float);
        answers.append(other);
        verdict = said === expected ? `Both models answer ${named(said)}` : `${verdict}, the float model ${named(expected)}`;
      }
      status.textContent = `${verdict}.`;
      const detail = { input: Array.from(shown.input), logits: packed.logits, float: float && float.logits };
      panel.dispatchEvent(new CustomEvent("answered", { detail }));
    }
  } catch (error) {
    status.textContent = `This browser could not compute the answer: ${error.message || error}`;
  } finally {
    busy = false;
  }
}

function take(image) {
  current = image;
  answer();
}

// --------------------------------------------------------------------------------------------------- what a person does

const ink = pad.getContext("2d");
const wipe = () => ink.clearRect(0, 0, pad.width, pad.height);

async function open(file) {
  if (!file) return;
  try {
    const image = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const scale = Math.min(pad.width / image.width, pad.height / image.height);
    const [w, h] = [image.width * scale, image.height * scale];
    wipe();
    ink.drawImage(image, (pad.width - w) / 2, (pad.height - h) / 2, w, h);
    strokes = [];
    take(drawn ? fromPaper(image) : fromPhotograph(image));
  } catch {
    status.textContent = `${file.name} is no image that this browser can read.`;
  }
}

function enableDrawing() {
  const cursor = [pad.width / 2, pad.height / 2];
  let drawing = false;
  const repaint = (showsPen) => {
    wipe();
    ink.strokeStyle = getComputedStyle(pad).color;
    trace(ink, 24);
    if (showsPen) ink.strokeRect(cursor[0] - 3, cursor[1] - 3, 6, 6);
  };
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
  };
  const draw = (showsPen = false) => {
    repaint(showsPen);
    take(fromStrokes());
  };
  pad.addEventListener("pointerdown", (event) => {
    drawing = true;
    pad.setPointerCapture(event.pointerId);
    strokes.push([at(event)]);
    repaint();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    strokes.at(-1).push(at(event));
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    pad.addEventListener(end, () => {
      if (drawing) draw();
      drawing = false;
    });
  }
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  pad.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    if (event.shiftKey && !drawing) strokes.push([[...cursor]]);
    drawing = event.shiftKey;
    cursor.forEach((value, axis) => {
      cursor[axis] = Math.min(pad.width - 12, Math.max(12, value + 16 * step[axis]));
    });
    if (!drawing) return repaint(true);
    strokes.at(-1).push([...cursor]);
    draw(true);
  });
  const clear = () => {
    strokes = [];
    current = undefined;
    wipe();
    answers.replaceChildren();
    seen.getContext("2d").clearRect(0, 0, seen.width, seen.height);
    status.textContent = "";
  };
  pad.addEventListener("keyup", () => { drawing = false; });
  document.getElementById("trial-clear").addEventListener("click", clear);
  const scans = document.getElementById("trial-scans");
  for (const [codes, label] of samples) {
    const button = element("button", ""), picture = element("canvas", "");
    button.type = "button";
    button.setAttribute("aria-label", `Scan of a ${named(label)}`);
    Object.assign(picture, { width: CELLS, height: CELLS });
    const context = picture.getContext("2d"), image = context.createImageData(CELLS, CELLS);
    codes.forEach((code, i) => image.data.set([255, 255, 255, code * 15.9375], 4 * i));
    context.putImageData(image, 0, 0);
    button.append(picture);
    button.addEventListener("click", () => {
      clear();
      ink.imageSmoothingEnabled = false;
      ink.drawImage(picture, 0, 0, pad.width, pad.height);
      take(fromCodes(codes));
    });
    scans.append(button);
  }
}

if (drawn) enableDrawing();
seen.width = width;
seen.height = height;
document.getElementById("trial-model")?.addEventListener("change", answer);
const chooser = document.getElementById("trial-file");
chooser.addEventListener("click", () => { chooser.value = ""; });  // the same file can be chosen again
chooser.addEventListener("change", () => open(chooser.files[0]));
for (const kind of ["dragover", "drop"]) panel.addEventListener(kind, (event) => event.preventDefault());
panel.addEventListener("dragover", () => panel.classList.add("over"));
for (const kind of ["dragleave", "drop"]) panel.addEventListener(kind, () => panel.classList.remove("over"));
panel.addEventListener("drop", (event) => open(event.dataTransfer.files[0]));
document.body.dataset.trial = "ready";
