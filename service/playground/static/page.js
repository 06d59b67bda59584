// What the page does in the browser. It asks this page's own server only: /api/live for what the
// server says of itself, once a second; /api/images for test images; /api/answer for an answer.

const MAX_UPLOAD_BYTES = 32 * 2 ** 20;
const PAGE_ROWS = 30; // as the server gives them
const SHOWN_CLASSES = 12; // beyond, the likeliest
const KEPT_SECONDS = 120;
const UNDO_STEPS = 20;
const LATE_MS = 6000; // without a word from our own server

const $ = (id) => document.getElementById(id);
const state = {
  models: [], up: null, lightOnBlack: undefined, last: null, // what was asked last, to be asked again
  asking: null, start: 0, imagesOf: "", rates: [], ratesOf: "", live: null, heard: 0,
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
function say(id, sentence) {
  const shown = sentence ? sentence[0].toUpperCase() + sentence.slice(1) : "";
  if ($(id).textContent !== shown) $(id).textContent = shown;
  $(id).hidden = !sentence;
}
function sayRefused(sentence) { // unless the same is said above, where the test images would be
  say("refused", sentence);
  if (!$("pick").hidden && !$("no-images").hidden && $("no-images").textContent === $("refused").textContent)
    $("refused").hidden = true;
}
const plain = (text) => text.replace(/\p{C}/gu, "�"); // as our server does with what it sends
const percent = (share) => share >= 0.99995 ? "100 %" : `${(100 * share).toFixed(share > 0.0995 && share < 0.9995 ? 1 : 2)} %`;
const small = (value) =>
  value === 0 ? "0" : value >= 0.01 ? value.toPrecision(2)
  : value.toExponential(1).replace(/e-?(\d+)/, (_, power) => `·10${[...`-${power}`].map((one) =>
    "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(one)]).join("")}`);
const milliseconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
const number = (value) => value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value < 10 ? 1 : 0);
const likeliest = (row) => row.indexOf(Math.max(...row));
const longer = (name) => ({ "saved-model": "original", served: "served", "self-check": "self-check" })[name] ?? name;

// Models and versions

function chosen() {
  return { model: $("model").value, version: $("version").value };
}
function showModels(models) {
  if (JSON.stringify(models) === JSON.stringify(state.models)) return;
  state.models = models;
  fill($("model"), models.map(({ name, versions }) =>
    [name, name, !versions.some((one) => one.state === "READY")]));
  showVersions();
}
function showVersions() {
  const model = state.models.find((one) => one.name === $("model").value);
  const versions = model ? model.versions : [];
  fill($("version"), [["", "the server's choice", false], ...versions.map((one) =>
    [one.version, `${one.version}${one.state === "READY" ? "" : `: ${one.reason || one.state}`}`, one.state !== "READY"])]);
  refreshImages();
  showLive();
}
function fill(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, text, disabled]) => make("option", { value, text, disabled })));
  const possible = choices.filter(([, , disabled]) => !disabled).map(([value]) => value);
  select.value = possible.includes(before) ? before : possible[0] ?? "";
}
$("model").addEventListener("change", () => { showVersions(); again(); });
$("version").addEventListener("change", () => { refreshImages(); showLive(); again(); });

// Test images

async function refreshImages(start = 0) {
  const { model, version } = chosen();
  if (!model || !state.up) return;
  const wanted = JSON.stringify([model, version, start]);
  state.imagesOf = wanted;
  const query = new URLSearchParams({ model, version, from: start });
  let found;
  try {
    found = await (await fetch(`/api/images?${query}`)).json();
  } catch {
    return; // said by the live panel
  }
  if (state.imagesOf !== wanted || found.away) return;
  state.lightOnBlack = found.light_on_black;
  say("ground", found.light_on_black ? "light on black, as the test images are." : "");
  say("no-images", found.error);
  sayRefused($("refused").textContent);
  $("pages").hidden = !found.images;
  $("images").replaceChildren();
  if (found.error) return;
  state.start = start;
  const size = found.images.length;
  $("place").textContent = `${start + 1} to ${start + size} of ${found.rows}`;
  $("earlier").disabled = start === 0;
  $("later").disabled = start + size >= found.rows;
  for (const image of found.images) {
    const button = make("button", {
      type: "button", title: image.label, "aria-label": `Test image ${image.row}, ${image.label}`,
      "aria-pressed": state.last?.row === image.row, "data-row": image.row,
    }, make("img", { src: image.source, alt: "" }));
    button.addEventListener("click", () => ask({ row: image.row }));
    $("images").append(button);
  }
  if (!state.last && size) ask({ row: found.images[0].row });
}
$("earlier").addEventListener("click", () => refreshImages(Math.max(0, state.start - PAGE_ROWS)));
$("later").addEventListener("click", () => refreshImages(state.start + PAGE_ROWS));

// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
function open(tab) {
  for (const one of tabs) {
    const selected = one === tab;
    one.setAttribute("aria-selected", selected);
    one.tabIndex = selected ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = !selected;
  }
  say("refused", "");
  say("hint", "");
}
for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(place + step + tabs.length) % tabs.length];
    open(next);
    next.focus();
  });
}

// Drawing

const canvas = $("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
const steps = [];
let stroke = null;
function blank() {
  pen.globalCompositeOperation = "source-over";
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
function drawTo(point) {
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = Number($("brush").value);
  pen.strokeStyle = $("erase").getAttribute("aria-pressed") === "true" ? "#000" : $("ink").value;
  pen.beginPath();
  pen.moveTo(...stroke);
  pen.lineTo(...point);
  pen.stroke();
  stroke = point;
}
function drawn() {
  $("undo").disabled = $("clear").disabled = steps.length === 0;
  if (steps.length === 0) return;
  canvas.toBlob((content) => ask({ content, drawn: true }));
}
canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  steps.push(pen.getImageData(0, 0, canvas.width, canvas.height));
  if (steps.length > UNDO_STEPS) steps.shift();
  stroke = at(event);
  drawTo(stroke);
});
canvas.addEventListener("pointermove", (event) => {
  if (stroke) for (const one of event.getCoalescedEvents?.() ?? [event]) drawTo(at(one));
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => {
  if (!stroke) return;
  stroke = null;
  drawn();
});
$("erase").addEventListener("click", (event) =>
  event.target.setAttribute("aria-pressed", event.target.getAttribute("aria-pressed") !== "true"));
$("undo").addEventListener("click", () => { pen.putImageData(steps.pop(), 0, 0); drawn(); });
$("clear").addEventListener("click", () => { steps.length = 0; blank(); drawn(); });
blank();

// Uploading

function upload(file) {
  if (!file) return;
  open($("tab-upload"));
  if (file.size > MAX_UPLOAD_BYTES) {
    say("refused", `“${plain(file.name)}” has ${Math.round(file.size / 2 ** 20)} MiB, expected at most 32; make it smaller`);
    return;
  }
  ask({ content: file, name: plain(file.name) });
}
$("file").addEventListener("change", () => { upload($("file").files[0]); $("file").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  $("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop") upload(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => upload(event.clipboardData.files[0]));
function preview(asked) {
  if (!asked.name) return;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(asked.content);
  $("preview").hidden = false;
}

// Asking

function again() { if (state.last) ask(state.last); }
$("invert").addEventListener("change", again);

async function ask(asked) {
  state.last = asked;
  for (const button of $("images").children) button.setAttribute("aria-pressed", Number(button.dataset.row) === asked.row);
  state.asking?.abort();
  const asking = state.asking = new AbortController();
  const { model, version } = chosen();
  const query = new URLSearchParams({ model, version, invert: $("invert").checked ? 1 : 0 });
  if (asked.row !== undefined) query.set("row", asked.row);
  $("answer").setAttribute("aria-busy", true);
  say("refused", "");
  let answered = false;
  try {
    const response = await fetch(`/api/answer?${query}`, { method: "POST", body: asked.content, signal: asking.signal });
    for await (const message of messages(response)) {
      if (asking !== state.asking) return;
      if (message.served) { answered = true; preview(asked); showAnswer(message.served); }
      if (message.missing) lack(message.missing);
      if (message.variants) showVariants(message.variants);
      if (message.error) refuse(message, answered);
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    refuse({ error: "the playground itself did not answer; it may have been stopped", away: true }, answered);
  } finally {
    if (asking === state.asking) $("answer").setAttribute("aria-busy", false);
  }
}
function refuse(message, answered) {
  if (answered) { lack(message.error); return; }
  state.retry = message.away === true;
  const name = state.last.name ? `“${state.last.name}”: ` : "";
  sayRefused(name + message.error + (state.retry ? ". This image is asked again when the server is back" : ""));
  $("answered").hidden = true;
  $("nothing").hidden = false;
  $("nothing").textContent = "No answer to this image.";
  lack("");
  if (!message.away) $("preview").hidden = true;
}
function lack(sentence) { // there are no variants, or no more of them
  say("missing", sentence);
  say("waiting", "");
  $("variants").replaceChildren();
  $("legend").hidden = $("integers").hidden = true;
}
async function* messages(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
    if (done) return;
  }
}

// The answer

function showAnswer(answer) {
  state.labels = answer.labels;
  state.retry = false;
  $("nothing").hidden = true;
  $("answered").hidden = false;
  $("seen").src = answer.seen;
  const [height, width, channels] = answer.shape;
  $("seen-size").textContent = `${width} × ${height}${channels === 1 ? ", gray" : ", RGB"}`;
  $("ink-label").hidden = channels === 1;
  const best = likeliest(answer.probabilities);
  $("top").replaceChildren(make("bdi", { text: answer.labels[best] }), " ", make("span", { text: percent(answer.probabilities[best]) }));
  const right = answer.truth === answer.labels[best];
  $("truth").replaceChildren(...!answer.truth ? [] : [make("span", {
    class: right ? "good" : "bad-text", text: right ? "✓ right" : `✗ it is: ${answer.truth}`,
  })]);
  $("by").textContent = `${answer.model}, version ${answer.version}`;
  showBars(answer);
  showLatency(answer.latency);
  say("hint", answer.light_border && state.lightOnBlack !== false && state.last.row === undefined ? "the border is light; if the model learnt light things on black, swap light and dark" : "");
  say("missing", "");
  say("waiting", "");
}
function showBars({ labels, probabilities }) {
  let places = labels.map((_, place) => place);
  const best = likeliest(probabilities);
  if (labels.length > SHOWN_CLASSES)
    places = places.sort((one, other) => probabilities[other] - probabilities[one]).slice(0, SHOWN_CLASSES);
  const bars = $("bars");
  while (bars.children.length > places.length) bars.lastChild.remove();
  while (bars.children.length < places.length)
    bars.append(make("li", {}, make("span", { class: "name", dir: "auto" }), make("span", { class: "track" }, make("i")), make("span", { class: "value" })));
  for (const [row, place] of places.entries()) {
    const [name, track, value] = bars.children[row].children;
    bars.children[row].className = place === best ? "first" : "";
    name.textContent = name.title = labels[place];
    track.firstChild.style.width = `${100 * probabilities[place]}%`;
    value.textContent = percent(probabilities[place]);
  }
}
function showLatency({ total_ms, queue_ms, compute_ms, requests }) {
  const [stack, list, note] = $("latency").children;
  const known = requests > 0;
  const way = Math.max(0, total_ms - queue_ms - compute_ms);
  const parts = known ? [["queue", "queue", queue_ms], ["compute", "compute", compute_ms], ["way", "there and back", way]] : [];
  for (const one of stack.children) one.style.width = "0";
  for (const [name, , value] of parts) stack.querySelector(`.${name}`).style.width = `${100 * value / (queue_ms + compute_ms + way)}%`;
  list.replaceChildren(
    make("div", {}, make("dt", { text: "latency" }), make("dd", { text: milliseconds(total_ms) })),
    ...parts.map(([name, text, value]) => make("div", {},
      make("dt", {}, make("i", { class: name }), text), make("dd", { text: milliseconds(value) }))));
  note.textContent = !known ? "The server does not say how long it waited: another replica may have counted it."
    : requests > 1 ? `Queue and compute are the mean of ${requests} requests that came at the same time.` : "";
}

// Variants

function showVariants(rows) {
  const waiting = rows.filter((row) => !row.probabilities && !row.refused && !row.error).map((row) => longer(row.variant));
  say("waiting", waiting.length ? `Waiting for ${waiting.join(", ")}${waiting.includes("original") ? "; TensorFlow takes ten seconds to start" : ""}.` : "");
  $("waiting").classList.toggle("spin", waiting.length > 0);
  $("legend").hidden = false;
  $("integers").hidden = !rows.some((row) => row.integers);
  const head = make("div", { role: "row", class: "head" }, ...["variant", "probabilities", "answer", "Δ to the original", "in the model"].map((text, place) =>
    make("span", { role: "columnheader", text, class: place === 4 ? "number" : "" })));
  $("variants").replaceChildren(head, ...rows.map((row) => variantRow(row)));
}
function variantRow(row) {
  const cells = { name: [], chart: [], answer: [], distance: [], time: [] };
  cells.name.push(make("strong", { text: longer(row.variant) }), make("small", {
    text: { "saved-model": "SavedModel on TensorFlow", served: "over gRPC" }[row.variant] ?? row.size ?? "",
  }));
  if (row.refused) cells.answer.push(make("small", { text: `not published: ${row.refused}` }));
  else if (row.error) cells.answer.push(make("span", { class: "bad-text", text: row.error }));
  else if (row.probabilities) {
    const best = likeliest(row.probabilities);
    cells.chart.push(columns(row.probabilities));
    cells.answer.push(make("span", { class: row.unexplained ? "bad-text" : "" },
      make("bdi", { text: state.labels[best] }), ` ${percent(row.probabilities[best])}`));
    if (row.same === false) cells.answer.push(make("small", { text: flip(row) }));
    if (row.variant === "saved-model") cells.distance.push(make("small", { text: "what the others are held to" }));
    else if (row.apart !== undefined) cells.distance.push(meter(row));
    cells.time.push(row.ms ? milliseconds(row.ms) : "");
  } else cells.answer.push(make("small", { class: "spin", text: "answering" }));
  return make("div", { role: "row", class: row.variant === "saved-model" ? "reference" : "", "data-variant": row.variant },
    ...Object.entries(cells).map(([name, content]) => make("div", { role: "cell", class: `${name}${name === "time" ? " number" : ""}` }, ...content)));
}
function columns(probabilities) {
  const picture = svg("svg", { viewBox: `0 0 ${probabilities.length * 10} 26`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const best = likeliest(probabilities);
  for (const [place, share] of probabilities.entries()) {
    const height = 1 + 25 * share;
    picture.append(svg("rect", { x: place * 10 + 1, y: 26 - height, width: 8, height, class: place === best ? "first" : "" }));
  }
  return picture;
}
function flip({ unexplained }) {
  if (unexplained === undefined) return "another class than the original's";
  return unexplained ? "another class, though the original's margin is over twice the budget"
    : "another class; the original's margin is within twice the budget";
}
function meter({ apart, allowed, integers, over }) {
  const bar = make("i");
  bar.style.width = `${allowed ? Math.min(100, 100 * apart / allowed) : 100}%`;
  const verdict = integers || !allowed ? "none" : over ? "over" : "";
  return make("span", { class: `meter ${verdict}` }, make("span", {}, bar), make("span", { text: small(apart) }),
    make("small", { text: !allowed ? "" : integers ? `budget ${small(allowed)}` : `of ${small(allowed)}` }));
}

// What the server says of itself

function showLive() {
  keepRates();
  const live = state.live, { model, version } = chosen();
  if (!live?.up) return;
  const ofModel = (list) => list.filter((one) => one.model === model && (!version || one.version === version));
  const loads = ofModel(live.load), parity = ofModel(live.parity).at(-1);
  const sum = (name) => loads.reduce((total, one) => total + (one[name] ?? 0), 0);
  $("load-of").textContent = model ? `of ${model}${version ? ` ${version}` : ", all versions"}, the last second` : "";
  const mean = (name) => {
    const known = loads.filter((one) => one[name] !== undefined && one.requests_per_s);
    const weight = known.reduce((total, one) => total + one.requests_per_s, 0);
    return weight ? known.reduce((total, one) => total + one[name] * one.requests_per_s, 0) / weight : undefined;
  };
  const or = (value, shown) => value === undefined ? "–" : shown(value);
  const figures = [
    ["images / s", number(sum("rows_per_s"))], ["requests / s", number(sum("requests_per_s"))],
    ["waiting, mean", number(sum("waiting"))], ["in the queue", or(mean("queue_ms"), milliseconds)],
    ["in the model", or(mean("compute_ms"), milliseconds)], ["images a batch", or(mean("batch_rows"), number)],
    ["answered in all", sum("rows").toLocaleString("en")], ["refused in all", sum("refused").toLocaleString("en")],
  ];
  $("figures").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
  showParity(parity);
}
function keepRates() { // of what is chosen now
  const of = JSON.stringify(chosen());
  if (of === state.ratesOf) return;
  state.ratesOf = of;
  state.rates = [];
  showChart();
}
function showChart() {
  const rates = state.rates, top = Math.max(10, ...rates) * 1.1, width = 300, height = 64;
  const points = rates.map((rate, place) =>
    `${(width - (rates.length - 1 - place) * width / (KEPT_SECONDS - 1)).toFixed(1)},${(height - 2 - (height - 6) * rate / top).toFixed(1)}`);
  if (!points.length) {
    $("peak").textContent = "";
    $("chart").replaceChildren();
    return;
  }
  $("peak").textContent = `images a second, the last two minutes; at most ${number(Math.max(...rates))}`;
  const first = points[0].split(",")[0];
  $("chart").replaceChildren(
    svg("path", { class: "area", d: `M${first},${height}L${points.join("L")}L${width},${height}Z` }),
    svg("path", { class: "line", d: `M${points.join("L")}` }));
}
function showParity(parity) {
  if (!parity) {
    $("parity-of").textContent = $("self-check").textContent = $("live").textContent = "";
    $("reports").replaceChildren();
    return;
  }
  $("parity-of").textContent = `of version ${parity.version} with the original, as the server reports it`;
  const key = JSON.stringify(parity);
  if (key === state.parity) return;
  state.parity = key;
  const row = (tag, words) => make("tr", {}, ...words.map((word, place) => {
    const cell = make(tag, { class: [place > 0 && place < 4 ? "number" : "", place === 2 || place === 3 ? "spare" : ""].join(" ") });
    cell.append(word);
    return cell;
  }));
  const verdict = (passed, why) => make("span", { class: passed ? "good" : "bad-text", title: why, text: passed ? "✓ passed" : "✗ failed" });
  const rows = parity.reports.map((one) => row("td", [
    longer(one.variant), meterText(one), one.accuracy ? percent(one.agreement) : "",
    one.accuracy ? `${one.explained + one.unexplained}` : "", verdict(one.passed, one.failure)]));
  const { live, check } = parity;
  if (live) rows.push(row("td", ["live", live.rows ? live.integers ? `at most ${small(live.apart)}` : meterText(live) : "",
    live.rows ? percent(live.agreement) : "", live.rows ? `${live.explained + live.unexplained}` : "",
    live.verdict === "unknown" ? make("span", { class: "quiet", text: "no rows" }) : verdict(live.verdict === "passed", live.failure)]));
  $("reports").replaceChildren(make("table", {}, row("th", ["", "|Δ| of allowed", "agreement", "flips", "verdict"]), ...rows));
  $("self-check").textContent = `Checked on ${check.cpu} when it was loaded, in ${check.ms.toFixed(0)} ms${check.failure ? `: ${check.failure}` : ""}.`;
  $("live").textContent = live
    ? `Live: ${live.rows.toLocaleString("en")} rows in the last ${live.window_s} s, ${live.total.toLocaleString("en")} in all${live.failure ? `; ${live.failure}` : ""}.`
    : "No shadow holds live answers against the original; train-export shadow does.";
}
const meterText = (one) => `${small(one.apart)} of ${small(one.allowed)}`;

function showUp(up) { // what the server said last is not what it does now
  for (const id of ["load", "parity"]) $(id).classList.toggle("stale", !up);
}
function hear(live) {
  state.heard = Date.now();
  const came = live.up && state.up !== true;
  state.up = live.up;
  state.live = live;
  const pill = live.up ? `serving on ${live.address}` : `no server on ${live.address}`;
  if ($("server").textContent !== pill) $("server").textContent = pill;
  $("server").className = `pill ${live.up ? "up" : "down"}`;
  say("away", live.up ? "" : `${live.reason}. This page goes on by itself when it is back.`);
  showUp(live.up);
  if (live.up) { showModels(live.models); showLive(); }
  const { model, version } = chosen();
  const rows = (live.load ?? []).filter((one) => one.model === model && (!version || one.version === version));
  state.rates.push(rows.reduce((total, one) => total + (one.rows_per_s ?? 0), 0));
  if (state.rates.length > KEPT_SECONDS) state.rates.shift();
  showChart();
  if (came) { refreshImages(state.start); if (state.retry) again(); }
}
function watch() {
  const events = new EventSource("/api/live");
  events.addEventListener("message", (event) => hear(JSON.parse(event.data)));
  setInterval(() => {
    if (Date.now() - state.heard < LATE_MS) return;
    state.up = false;
    showUp(false);
    $("server").textContent = "the playground has stopped";
    $("server").className = "pill down";
    say("away", "The playground itself does not answer. This page goes on by itself when it is back.");
    if (events.readyState === EventSource.CLOSED) { state.heard = Date.now(); events.close(); watchAgain(); }
  }, 1000);
}
function watchAgain() { location.reload(); }
state.heard = Date.now();
watch();
