// The page of a pilot: it keeps the state that the server sends, and shows it. Names and output are anybody's text:
// they get into the page by textContent only.
"use strict";

const state = { pilot: null, nodes: {}, executions: {}, progress: {}, queue: {}, failures: {}, history: {} };
const $ = (id) => document.getElementById(id);
const inOrder = new Intl.Collator("en", { numeric: true }).compare;  // n2 before n10
const KINDS = ["finished", "failed", "canceled", "handed", "waiting"];

// -- texts -----------------------------------------------------------------------------------------------------------

const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
const rate = (value) => (value >= 100 ? number(Math.round(value)) : value ? String(Math.round(value * 10) / 10) : "0");
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 9.95) return seconds.toFixed(1) + " s";
  const whole = Math.round(seconds);
  for (const [size, unit, part, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]])
    if (whole >= size) { const rest = Math.floor(whole % size / part); return Math.floor(whole / size) + " " + unit + (rest ? " " + rest + " " + small : ""); }
  return whole + " s";
}
function bytes(value) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"]])
    if (value >= size) return (value / size).toPrecision(3).replace(/\.0+$/, "") + " " + unit;
  return number(value) + " B";
}
const moment = (at) => (at ? new Date(at * 1000).toLocaleString("sv-SE") : "");
const named = (name) => (name === null ? "others, whose names were not read" : name || "without a name");
const reasonText = (reason, code) => (reason === "exit" ? "exit code " + code : reason);
function expand(ranges) {
  const found = [];
  for (const piece of ranges ? ranges.split(",") : []) {
    const [low, high] = piece.split("-").map(Number);
    for (let core = low; core <= (high === undefined ? low : high); core++) found.push(core);
  }
  return found;
}
// n1[0:1;g0],n2[0] -> [["n1", [0, 1], ["g0"]], ...]
const allocation = (text) => (text ? text.split("],").map((piece) => {
  const at = piece.indexOf("["), [cores, gpus] = piece.slice(at + 1).replace(/\]$/, "").split(";");
  return [piece.slice(0, at), cores ? cores.split(":").map(Number) : [], gpus ? gpus.split(":").map((gpu) => gpu.split("@")[0]) : []];
}) : []);

// -- elements ----------------------------------------------------------------------------------------------------------

function make(tag, text, attributes) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
}
const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const taskLink = (id, text) => make("a", text || id, { href: "#/task/" + encodeURIComponent(id) });
const nodeLink = (name) => make("a", name, { href: "#/node/" + encodeURIComponent(name) });
function button(text, action, attributes) {
  const element = make("button", text, { type: "button", class: "small", ...attributes });
  element.addEventListener("click", action);
  return element;
}
// Keep one element for each key, in this order: what has the focus keeps it.
function keyed(parent, keys, create, fill) {
  const old = parent.kept || new Map(), rows = new Map();
  for (const key of keys) rows.set(key, old.get(key) || create(key));
  for (const [key, element] of old) if (!rows.has(key)) element.remove();
  let before = parent.firstChild;
  for (const [key, element] of rows) {
    if (element === before) before = before.nextSibling; else parent.insertBefore(element, before);
    fill(element, key);
  }
  parent.kept = rows;
}
function row(numbers, count) {
  const element = make("tr");
  for (let i = 0; i < count; i++) element.append(make("td", "", numbers.includes(i) ? { class: "n" } : {}));
  return element;
}
function bar(element, parts, total) {
  while (element.children.length < parts.length) element.append(make("i", null, { class: KINDS[element.children.length] }));
  parts.forEach((part, i) => {
    const width = total ? Math.max(part / total * 100, part ? 0.4 : 0) + "%" : "0";
    if (element.children[i].style.width !== width) element.children[i].style.width = width;
  });
  element.setAttribute("aria-label", KINDS.map((kind, i) => kind + " " + number(parts[i])).join(", "));
}

// -- what is asked of the server ------------------------------------------------------------------------------------------

async function get(path) {
  const answer = await fetch(path), found = await answer.json();
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
}
async function press(path, body) {
  try {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const found = await answer.json().catch(() => ({}));
    say(answer.ok ? (found.said || []).join("; ") : found.error || "it was refused");
  } catch (error) { say("the server does not answer: " + error.message); }
  show();
}
function say(text) {
  put($("said"), text);
  clearTimeout(say.timer);
  say.timer = setTimeout(() => put($("said"), ""), 12000);
}
// Ask, then do: `more` is the label of a text to give, `choices` is [[value, text], ...].
function ask(title, text, action, { more, choices } = {}) {
  put($("ask-title"), title); put($("ask-text"), text);
  $("ask-more").hidden = !more; $("ask-which").hidden = !choices; $("ask-input").value = "";
  if (more) put($("ask-more").firstElementChild, more);
  $("ask-select").replaceChildren(...(choices || []).map(([value, words]) => make("option", words, { value })));
  const dialog = $("ask");
  dialog.returnValue = "no";
  dialog.onclose = () => { if (dialog.returnValue === "yes") action($("ask-input").value, $("ask-select").value); };
  dialog.showModal();
  (more ? $("ask-input") : $("ask-no")).focus();
}
const cancelTask = (id) => ask("Cancel task " + id + "?", "If it waits it never starts; if it runs its processes are ended.", () => press("/api/cancel", { ids: [id] }).then(reload));
const retryTask = (id) => ask("Run task " + id + " again?", "It gets one more execution; of an array the elements that did not finish.", () => press("/api/retry", { ids: [id] }).then(reload));
const drain = (name) => ask("Drain node " + name + "?", "It gets nothing new; what runs there goes on.", (reason) => press("/api/drain", { nodes: [name], reason }), { more: "reason, shown to others" });
const resume = (name) => ask("Use node " + name + " again?", "It gets new tasks.", () => press("/api/resume", { nodes: [name] }));
const nodeButton = (name) => (state.nodes[name] && !["up", "lost"].includes(state.nodes[name].state)
  ? button("Resume", () => resume(name), { "aria-label": "Resume node " + name }) : button("Drain", () => drain(name), { "aria-label": "Drain node " + name }));

// -- the state --------------------------------------------------------------------------------------------------------------

let source = null;
function connect() {
  if (source) source.close();
  source = new EventSource("/api/events");
  source.addEventListener("state", (event) => { Object.assign(state, JSON.parse(event.data)); if (state.pilot) { linked("live"); show(); } });
  source.addEventListener("change", (event) => {
    for (const [section, rows] of Object.entries(JSON.parse(event.data))) {
      if (section === "pilot") { state.pilot = rows[""]; continue; }
      for (const [key, value] of Object.entries(rows)) if (value === null) delete state[section][key]; else state[section][key] = value;
    }
    linked("live");
    show();
  });
  source.addEventListener("full", () => { source.close(); linked("lost", "too many pages are open"); });
  source.onerror = () => linked("lost", "no connection: the pilot or its page has ended, or the tunnel");
}
function linked(how, text) { const element = $("link"); element.className = how; put(element, text || how); }
// A browser has few connections to one server: a page that nobody sees needs none.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { if (source) source.close(); source = null; if (logs && !logs.ended) { logs.close(); logs.asleep = true; } }
  else { connect(); if (logs && logs.asleep) logs.again(); }
});

let planned = false;
function show() {
  if (planned || !state.pilot) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    showTop();
    if (!$("overview").hidden) { showNumbers(); map.draw(); showNodes(); showSparks(); showProgress(); showQueue(); showFailures(); }
    if (!performance.getEntriesByName("shown").length) performance.mark("shown");
    document.documentElement.dataset.shown = "yes";
  });
}
function showTop() {
  const pilot = state.pilot, notes = [...pilot.notes];
  if (pilot.trouble) notes.push(pilot.trouble);
  if (pilot.behind > 65536) notes.push("names and failures are incomplete: " + bytes(pilot.behind) + " of the journal are still being read");
  $("notes").hidden = !notes.length;
  if ($("notes").dataset.text !== notes.join()) { $("notes").dataset.text = notes.join(); $("notes").replaceChildren(...notes.map((note) => make("li", note))); }
  put($("pause"), pilot.paused ? "Go on" : "Pause");
  const ended = pilot.total - pilot.left;
  document.title = (pilot.total ? Math.floor(ended / pilot.total * 100) + " % " : "") + "pilotq";
}
function showNumbers() {
  const pilot = state.pilot;
  for (const name of ["finished", "failed", "canceled", "running", "prefetched", "waiting", "total", "used", "cores"]) put($(name), number(pilot[name]));
  put($("rate"), rate(pilot.rate)); put($("left"), duration(pilot.left_s));
  $("waiting").title = pilot.deferred ? number(pilot.deferred) + " of these wait for other tasks" : "";
  bar($("whole"), [pilot.finished, pilot.failed, pilot.canceled, pilot.running + pilot.prefetched, pilot.waiting], pilot.total);
}
function showNodes() {
  const names = Object.keys(state.nodes).sort(inOrder), down = names.filter((name) => state.nodes[name].state !== "up");
  put($("nodes-sum"), number(names.length) + (names.length === 1 ? " node, " : " nodes, ") + number(state.pilot.used) + " of " + number(state.pilot.cores) + " cores in use" + (state.pilot.detailed ? "" : "; each node is filled as far as its cores are in use"));
  keyed($("closed"), down.slice(0, 20), (name) => { const item = make("li"); item.append(nodeLink(name), make("span"), make("span", " ")); return item; }, (item, name) => {
    const node = state.nodes[name];
    put(item.children[1], " is " + node.state + (node.why ? ": " + node.why : "") + " ");
    if (item.dataset.state !== node.state) { item.dataset.state = node.state; item.children[2].replaceChildren(...(node.state === "lost" ? [] : [nodeButton(name)])); }
  });
  if (!$("nodes-list").open) return;
  keyed($("nodes-list").querySelector("tbody"), names, (name) => { const element = row([2, 3], 7); element.children[0].append(nodeLink(name)); return element; }, (element, name) => {
    const node = state.nodes[name], cells = element.children, said = node.state + (node.why ? ": " + node.why : "");
    put(cells[1], said); cells[1].className = "state " + node.state;
    put(cells[2], number(node.used)); put(cells[3], number(map.cores(name).length));
    put(cells[4], node.memory ? bytes(node.memory_used || 0) + " of " + bytes(node.memory) : "");
    put(cells[5], (node.gpus || []).length ? node.gpus.length + " " + (node.gpus[0][1] || "") : "");
    if (element.dataset.state !== node.state) { element.dataset.state = node.state; cells[6].replaceChildren(nodeButton(name)); }
  });
}
$("nodes-list").addEventListener("toggle", show);

function showProgress() {
  const keys = Object.keys(state.progress);
  $("progress").querySelector(".empty").hidden = keys.length > 0;
  keyed($("progress").querySelector("tbody"), keys, () => { const element = row([2, 3, 4, 5, 6], 7); element.children[1].append(make("div", null, { class: "bar", role: "img" })); return element; }, (element, key) => {
    const [name, array, total, finished, failed, canceled, handed, waiting, speed, left] = state.progress[key], cells = element.children;
    const text = named(name) + (array ? " [" + array + "]" : "");
    if (cells[0].textContent !== text) cells[0].replaceChildren(array ? taskLink(array, text) : make("span", text));
    bar(cells[1].firstChild, [finished, failed, canceled, handed, waiting], total);
    put(cells[2], number(finished + failed + canceled)); put(cells[3], number(total)); put(cells[4], failed ? number(failed) : "");
    put(cells[5], speed ? rate(speed) : ""); put(cells[6], left === null ? "" : duration(left));
  });
}
function showQueue() {
  const keys = Object.keys(state.queue), pilot = state.pilot;
  $("queue").querySelector(".empty").hidden = keys.length > 0;
  put($("queue-sum"), [pilot.prefetched ? number(pilot.prefetched) + " more are prefetched: on nodes already, and not started" : "", pilot.deferred ? number(pilot.deferred) + (pilot.deferred === 1 ? " waits" : " wait") + " for other tasks" : "", pilot.more_classes ? number(pilot.more_classes) + " more shapes" : ""].filter(Boolean).join("; "));
  keyed($("queue").querySelector("tbody"), keys, () => row([0, 2], 6), (element, key) => {
    const [priority, queue, shape, waiting, first, why, until] = state.queue[key], cells = element.children;
    put(cells[0], number(waiting)); put(cells[1], shape); put(cells[2], String(priority)); put(cells[3], queue);
    if (cells[4].textContent !== first) cells[4].replaceChildren(...(first ? [taskLink(first)] : []));
    put(cells[5], why.join("; ") + (until ? " (by " + moment(until) + ")" : ""));
  });
}
function showFailures() {
  const groups = new Map();
  for (const [key, one] of Object.entries(state.failures)) {
    const title = reasonText(one[0], one[1]);
    if (!groups.has(title)) groups.set(title, []);
    groups.get(title).push(key);
  }
  $("failures").querySelector(".empty").hidden = groups.size > 0;
  put($("failures-sum"), state.pilot.more_failures ? number(state.pilot.more_failures) + " more failures are not shown" : "");
  const sum = (keys) => keys.reduce((total, key) => total + state.failures[key][4], 0);
  keyed($("failure-list"), [...groups.keys()], (title) => { const element = make("div", null, { class: "reason" }); element.append(make("h3", title), make("div")); return element; }, (element, title) => {
    const keys = groups.get(title), total = sum(keys);
    put(element.firstChild, title + ": " + number(total) + (total === 1 ? " task" : " tasks"));
    keyed(element.lastChild, keys, failureRow, (line, key) => {
      const [, , name, node, count, example, message] = state.failures[key], cells = line.children;
      put(cells[0], named(name) + (message && state.failures[key][0] !== "exit" ? ": " + message : "")); put(cells[1], node ? "on " + node : ""); put(cells[2], number(count) + "×");
      if (line.dataset.example !== example) { line.dataset.example = example; cells[3].replaceChildren("last: ", taskLink(example)); }
    });
  });
}
function failureRow(key) {
  const line = make("div", null, { class: "failure" }), actions = make("div", null, { class: "buttons" }), output = make("pre", null, { tabindex: "0", "aria-label": "the end of stderr" });
  output.hidden = true;
  const look = button("stderr", async () => {
    output.hidden = !output.hidden;
    look.setAttribute("aria-expanded", String(!output.hidden));
    if (output.hidden) return;
    output.textContent = "reading";
    try {
      const { task } = await get("/api/task/" + encodeURIComponent(line.dataset.example));
      output.textContent = task.stderr_tail.trimEnd().split("\n").slice(-15).join("\n") || "It has written nothing to stderr.";
    } catch (error) { output.textContent = error.message; }
  }, { "aria-expanded": "false" });
  const again = button("Retry", () => {
    const one = state.failures[key];
    if (one) ask("Run " + (one[4] === 1 ? "this task" : "these " + number(one[4]) + " tasks") + " again?", named(one[2]) + ", " + reasonText(one[0], one[1]) + (one[3] ? ", on " + one[3] : "") + (one[4] > 500 ? "; the last 500 of them at a time" : ""), () => press("/api/retry", { failure: key }));
  });
  actions.append(look, again);
  line.append(make("span"), make("span", null, { class: "dim" }), make("span", null, { class: "n" }), make("span"), actions, output);
  return line;
}

// -- the last minutes -----------------------------------------------------------------------------------------------------------

function context(canvas, height) {
  const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) { canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale); }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
function showSparks() {
  const samples = Object.entries(state.history).sort(([a], [b]) => a - b).map(([, sample]) => sample), each = state.pilot.seconds;
  const whole = samples.map((sample) => sample[0] / each);
  spark($("spark-ended"), whole, Math.max(...whole, 0.1), colour("finished"));
  put($("spark-ended-now"), rate(state.pilot.rate) + " (most: " + rate(Math.max(...whole, state.pilot.rate)) + ")");
  spark($("spark-used"), samples.map((sample) => sample[1]), Math.max(...samples.map((sample) => sample[2] || 0), 1), colour("handed"));
  put($("spark-used-now"), state.pilot.cores ? Math.round(state.pilot.used / state.pilot.cores * 100) + " %" : "–");
}
function spark(canvas, values, most, fill) {
  const [pen, width] = context(canvas, 64), step = width / Math.max(values.length, 1);
  pen.fillStyle = colour("line"); pen.fillRect(0, 63, width, 1);
  pen.fillStyle = fill;
  values.forEach((value, i) => { if (value) { const height = Math.max(value / most * 60, 1); pen.fillRect(i * step, 63 - height, Math.max(step - 1, 1), height); } });
}

// -- the map of nodes and cores ---------------------------------------------------------------------------------------------------

const map = {
  spots: [], chosen: null, expanded: new Map(),
  cores(name) {
    const text = state.nodes[name].cores || "";
    const known = this.expanded.get(name);
    if (known && known[0] === text) return known[1];
    const found = expand(text);
    this.expanded.set(name, [text, found]);
    return found;
  },
  colours: new Map(),
  ofName(name) {
    const key = name.replace(/[0-9]+/g, "*");
    if (!this.colours.has(key)) this.colours.set(key, (210 + this.colours.size * 137.5) % 360);  // far from the last ones
    return "hsl(" + this.colours.get(key) + (matchMedia("(prefers-color-scheme: dark)").matches ? " 60% 58%)" : " 62% 44%)");
  },
  // What runs where: node -> core or "g" + GPU -> execution.
  places() {
    const found = new Map();
    for (const [key, one] of Object.entries(state.executions))
      for (const [node, cores, gpus] of allocation(one.cores)) {
        if (!found.has(node)) found.set(node, new Map());
        const there = found.get(node);
        for (const core of cores) there.set(core, key);
        for (const gpu of gpus) there.set("g" + gpu, key);
      }
    return found;
  },
  // The size of a core, so that all nodes have room in about `height`.
  cell(width, names, height) {
    for (let size = 22; size > 4; size--) if (this.blocks(width, names, size).height <= height) return size;
    return 4;
  },
  blocks(width, names, size) {
    const placed = [];
    let x = 0, y = 0, tall = 0;
    for (const name of names) {
      const count = Math.max(this.cores(name).length, 1), gpus = (state.nodes[name].gpus || []).length;
      const across = Math.min(count <= 12 ? count : Math.ceil(Math.sqrt(count) * 1.4), Math.max(Math.floor(width / size), 1));
      const down = Math.ceil(count / across), w = Math.max(across * size, gpus * (size + 2), 34) + 10;
      const h = 16 + down * size + (gpus ? size + 3 : 0) + (state.nodes[name].memory ? 6 : 0) + 8;
      if (x && x + w > width) { x = 0; y += tall; tall = 0; }
      placed.push({ name, x, y, w, h, across, down });
      x += w; tall = Math.max(tall, h);
    }
    return { placed, height: y + tall };
  },
  draw() {
    const names = Object.keys(state.nodes).sort(inOrder), canvas = $("map"), width = canvas.clientWidth || 300;
    this.spots = [];
    if (state.pilot.detailed) this.drawCores(canvas, width, names); else this.drawNodes(canvas, width, names);
    if (this.chosen) this.choose(this.spots.find((spot) => spot.key === this.chosen.key) || null, false);
  },
  size(canvas, height) { if (canvas.style.height !== height + "px") canvas.style.height = height + "px"; return context(canvas, height)[0]; },
  drawCores(canvas, width, names) {
    const size = this.cell(width, names, 420), { placed, height } = this.blocks(width, names, size), pen = this.size(canvas, Math.max(height, 30));
    const places = this.places(), byName = $("colour").value === "name", gap = size > 7 ? 2 : 1;
    const paint = { idle: colour("idle"), handed: colour("handed"), text: colour("text"), dim: colour("dim"), failed: colour("failed"), mark: colour("mark"), waiting: colour("waiting") };
    pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "top";
    for (const block of placed) {
      const node = state.nodes[block.name], there = places.get(block.name) || new Map(), cores = this.cores(block.name);
      this.label(pen, block, node, paint);
      let unnamed = Math.max(node.used - cores.filter((core) => there.has(core)).length, 0);
      cores.forEach((core, i) => {
        const x = block.x + (i % block.across) * size, y = block.y + 16 + Math.floor(i / block.across) * size, key = there.get(core), side = size - gap;
        const hidden = !key && unnamed > 0;
        if (hidden) unnamed--;
        pen.fillStyle = node.state === "lost" ? paint.waiting : key ? (byName ? this.ofName(this.nameOf(key)) : paint.handed) : paint.idle;
        pen.fillRect(x, y, side, side);
        if (hidden) this.hatch(pen, x, y, side, paint.handed);
        if ((node.threads || {})[core] && size > 6) { pen.fillStyle = paint.dim; pen.fillRect(x, y + side - 2, side, 1); }
        this.spots.push({ key: block.name + "/" + core, x, y, w: side, h: side, node: block.name, core, execution: key, hidden });
      });
      let y = block.y + 16 + block.down * size;
      (node.gpus || []).forEach(([gpu], i) => {
        const key = there.get("g" + gpu), x = block.x + i * (size + 2);
        pen.fillStyle = key ? (byName ? this.ofName(this.nameOf(key)) : paint.handed) : paint.idle;
        pen.beginPath(); pen.roundRect(x, y + 2, size, size - gap, size / 2); pen.fill();
        this.spots.push({ key: block.name + "/g" + gpu, x, y: y + 2, w: size, h: size - gap, node: block.name, gpu, execution: key });
      });
      if ((node.gpus || []).length) y += size + 3;
      if (node.memory) {
        pen.fillStyle = paint.idle; pen.fillRect(block.x, y + 1, block.w - 12, 3);
        pen.fillStyle = paint.mark; pen.fillRect(block.x, y + 1, (block.w - 12) * Math.min((node.memory_used || 0) / node.memory, 1), 3);
      }
    }
    this.outline(pen);
  },
  drawNodes(canvas, width, names) {
    const w = names.length > 300 ? 26 : width < 500 ? 38 : 58, h = names.length > 300 ? 20 : 36, across = Math.max(Math.floor(width / w), 1);
    const pen = this.size(canvas, Math.max(Math.ceil(names.length / across), 1) * h + 2);
    const paint = { idle: colour("idle"), handed: colour("handed"), text: colour("text"), failed: colour("failed"), mark: colour("mark"), waiting: colour("waiting") };
    pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "top";
    names.forEach((name, i) => {
      const node = state.nodes[name], x = i % across * w, y = Math.floor(i / across) * h, label = h > 30 ? 14 : 0;
      const part = Math.min(node.used / Math.max(this.cores(name).length, 1), 1), tall = (h - label - 4) * part;
      if (label) this.label(pen, { name, x, y, w: w - 4 }, node, paint);
      pen.fillStyle = node.state === "lost" ? paint.waiting : paint.idle; pen.fillRect(x, y + label, w - 4, h - label - 4);
      pen.fillStyle = paint.handed; pen.fillRect(x, y + label + (h - label - 4) - tall, w - 4, tall);
      if (node.state !== "up") { pen.strokeStyle = node.state === "lost" ? paint.failed : paint.mark; pen.lineWidth = 2; pen.strokeRect(x + 1, y + label + 1, w - 6, h - label - 6); }
      this.spots.push({ key: name, x, y, w: w - 4, h: h - 4, node: name });
    });
    this.outline(pen);
  },
  label(pen, block, node, paint) {
    pen.fillStyle = node.state === "up" ? paint.text : node.state === "lost" ? paint.failed : paint.mark;
    let text = (node.state === "up" ? "" : node.state === "lost" ? "✕ " : "‖ ") + block.name;
    const room = block.w - 6;
    while (text.length > 1 && pen.measureText(text).width > room) text = text.slice(0, -1);
    pen.fillText(text, block.x, block.y + 1);
  },
  hatch(pen, x, y, side, paint) {
    pen.save(); pen.beginPath(); pen.rect(x, y, side, side); pen.clip();
    pen.strokeStyle = paint; pen.lineWidth = Math.max(side / 6, 1); pen.beginPath();
    for (let at = -side; at < side; at += Math.max(side / 3, 3)) { pen.moveTo(x + at, y + side); pen.lineTo(x + at + side, y); }
    pen.stroke(); pen.restore();
  },
  outline(pen) {
    const spot = this.chosen && this.spots.find((one) => one.key === this.chosen.key);
    if (spot) { pen.strokeStyle = colour("text"); pen.lineWidth = 2; pen.strokeRect(spot.x - 1, spot.y - 1, spot.w + 2, spot.h + 2); }
  },
  nameOf(key) { const one = state.executions[key]; return one ? one.name || one.array || "" : ""; },
  words(spot) {
    const node = state.nodes[spot.node];
    if (!node) return "";
    const where = spot.gpu !== undefined ? spot.node + ", GPU " + spot.gpu : spot.core !== undefined ? spot.node + ", core " + spot.core : spot.node;
    const one = spot.execution && state.executions[spot.execution], closed = node.state === "up" ? "" : "; the node is " + node.state + (node.why ? ": " + node.why : "");
    if (one) return where + ": task " + spot.execution.replace(/:[0-9]+$/, "") + (one.name ? " (" + one.name + ")" : "") + ", for " + duration(Date.now() / 1000 - one.started) + closed;
    if (spot.core === undefined && spot.gpu === undefined) return where + ": " + number(node.used) + " of " + number(this.cores(spot.node).length) + " cores in use" + closed;
    const some = Object.keys(node.elements || {});
    return where + ": " + (spot.hidden ? "in use" + (some.length ? ", by short tasks of " + some.slice(0, 3).join(", ") : "") : "free") + closed;
  },
  choose(spot, speak = true) { this.chosen = spot; put($("map-says"), spot && document.activeElement === $("map") ? this.words(spot) : ""); if (speak) this.draw(); },
  at(event) {
    const x = event.offsetX, y = event.offsetY;
    return this.spots.find((spot) => x >= spot.x - 1 && x < spot.x + spot.w + 1 && y >= spot.y - 1 && y < spot.y + spot.h + 1);
  },
  open(spot) {
    if (spot) location.hash = spot.execution ? "#/task/" + encodeURIComponent(spot.execution.replace(/:[0-9]+$/, "")) : "#/node/" + encodeURIComponent(spot.node);
  },
  move(dx, dy) {
    if (!this.spots.length) return;
    const from = this.chosen && this.spots.find((spot) => spot.key === this.chosen.key);
    if (!from) { this.choose(this.spots[0]); return; }
    if (dx) { this.choose(this.spots[(this.spots.indexOf(from) + dx + this.spots.length) % this.spots.length]); return; }
    const rows = this.spots.filter((spot) => (spot.y - from.y) * dy > 2);
    const near = (spot) => Math.abs(spot.y - from.y) * 4 + Math.abs(spot.x - from.x);
    if (rows.length) this.choose(rows.reduce((best, spot) => (near(spot) < near(best) ? spot : best)));
  },
};
$("map").addEventListener("mousemove", (event) => {
  const spot = map.at(event), tip = $("tip");
  tip.hidden = !spot;
  if (!spot) return;
  put(tip, map.words(spot));
  tip.style.left = Math.max(Math.min(event.offsetX + 12, $("map").clientWidth - tip.offsetWidth), 0) + "px"; tip.style.top = event.offsetY + 16 + "px";
});
$("map").addEventListener("mouseleave", () => { $("tip").hidden = true; });
$("map").addEventListener("click", (event) => map.open(map.at(event)));
$("map").addEventListener("keydown", (event) => {
  const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (step) { event.preventDefault(); map.move(...step); } else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); map.open(map.chosen); }
});
$("map").addEventListener("blur", () => { map.chosen = null; show(); });
$("colour").addEventListener("change", show);
addEventListener("resize", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

// -- a task, a node, what was searched for -------------------------------------------------------------------------------------------

let logs = null, again = null, shownAt = 0;
function leave() {
  if (logs) logs.close();
  logs = null; clearTimeout(again); shownAt++;
}
async function go() {
  leave();
  const at = shownAt, [, kind, ...rest] = location.hash.split("/"), detail = $("detail"), pages = { task: taskPage, node: nodePage, find: findPage };
  const words = rest.map((part) => { try { return decodeURIComponent(part); } catch { return part; } }).join("/");
  $("overview").hidden = Boolean(pages[kind]); detail.hidden = !pages[kind];
  if (!pages[kind]) { show(); return; }
  detail.replaceChildren(make("div", "reading"));
  await pages[kind](words, at);
  if (at === shownAt) $("main").focus({ preventScroll: true });
}
addEventListener("hashchange", go);
function reload() { if (!$("detail").hidden) go(); }
function card(...content) { const element = make("div"); element.append(...content); return element; }
function facts(pairs) {
  const list = make("dl", null, { class: "facts" });
  for (const [name, value] of pairs) if (value !== "" && value !== null && value !== undefined) { const cell = make("dd"); cell.append(value); list.append(make("dt", name), cell); }
  return list;
}
function heading(text) { const title = make("div", null, { class: "title" }); title.append(make("h2", text), make("a", "back to the overview", { href: "#/" })); return title; }
function refused(error, at) { if (at === shownAt) $("detail").replaceChildren(card(heading("Not found"), make("p", error.message))); }

async function taskPage(id, at) {
  let found;
  try { found = await get("/api/task/" + encodeURIComponent(id)); } catch (error) { refused(error, at); return; }
  if (at !== shownAt) return;
  const head = card(), why = card(), runs = card();
  const parts = [head, why, runs];
  fillTask(head, why, runs, found);
  if (!found.task.array_size) parts.splice(2, 0, output(found.task.id));
  $("detail").replaceChildren(...parts);
  const repeat = async () => {
    if (at !== shownAt) return;
    try { found = await get("/api/task/" + encodeURIComponent(found.task.id)); } catch { found = null; }
    if (at !== shownAt || !found) return;
    fillTask(head, why, runs, found);
    again = setTimeout(repeat, found.task.ended ? 10000 : 2000);
  };
  again = setTimeout(repeat, 2000);
}
function fillTask(head, why, runs, { task, explain, executions, more_executions }) {
  const seen = JSON.stringify([task, explain, executions]);
  if (head.seen === seen) return;
  head.seen = seen;
  const kept = document.activeElement && head.contains(document.activeElement) ? document.activeElement.textContent : null;
  const actions = make("div", null, { class: "buttons" }), times = task.times, parts = task.is_bundle ? "tasks" : "elements";
  if (!task.ended) actions.append(button("Cancel", () => cancelTask(task.id), { id: "cancel", class: "grave" }));
  if (task.ended && task.status !== "finished") actions.append(button("Retry", () => retryTask(task.id), { id: "retry" }));
  const status = make("span", task.status, { class: "state " + task.status });
  head.replaceChildren(heading((task.is_bundle ? "Bundle " : task.array_size ? "Array " : "Task ") + task.id + (task.name ? ": " + task.name : "")), actions, facts([
    ["status", status], ["reason", reasonText(task.reason, task.exit_code)], ["message", task.message], ["exit code", task.exit_code], ["signal", task.signal], ["command", task.command],
    ["queue", task.queue], [task.index === null ? "bundle" : "array", task.array ? taskLink(task.array, task.array + (task.index === null ? "" : ", index " + task.index)) : ""], [parts, task.array_size ? number(task.array_size) : ""],
    ["at a time", task.array_limit ? "at most " + number(task.array_limit) : ""], ...Object.entries(task.elements).map(([word, ranges]) => [parts + " " + word, ranges]),
    ["node", task.node ? nodeLink(task.node) : ""], ["cores", task.cores], ["execution", task.execution || ""], ["retries left", task.retries || ""],
    ["queued", moment(times.queued)], ["handed", moment(times.handed)], ["started", moment(times.started)], ["ended", moment(times.ended)], ["ran", task.ran === null ? "" : duration(task.ran)],
    ["CPU time", task.cpu === null ? "" : duration(task.cpu)], ["memory", task.max_rss ? bytes(task.max_rss) + " at most" : ""],
  ]));
  if (kept) { const same = [...head.querySelectorAll("button, a")].find((one) => one.textContent === kept); if (same) same.focus(); }
  const list = make("ul");
  list.append(...explain.why.map((sentence) => make("li", sentence)));
  const others = make("p", explain.tasks.length ? "because of " : "");
  explain.tasks.forEach((other) => others.append(taskLink(other), " "));
  why.replaceChildren(make("h2", "Why"), list, others, make("p", explain.until ? "by " + moment(explain.until) + " at the latest" : "", { class: "dim" }));
  runs.hidden = !executions.length;
  const table = make("table"), body = make("tbody"), top = make("tr"), box = make("div", null, { class: "wide" });
  for (const word of ["execution", "status", "where", "started", "ran", "CPU", "memory", "message"]) top.append(make("th", word, { scope: "col" }));
  for (const one of executions) {
    const line = make("tr"), ran = one.started && one.ended ? duration(one.ended - one.started) : "";
    for (const text of [String(one.execution || "–"), one.status + (one.reason ? ", " + reasonText(one.reason, one.exit_code) : "") + (one.final ? "" : " (not the last)"), one.cores, moment(one.started), ran, one.cpu === null ? "" : duration(one.cpu), one.max_rss ? bytes(one.max_rss) : "", one.message]) line.append(make("td", text));
    body.append(line);
  }
  const header = make("thead");
  header.append(top); table.append(make("caption", "Executions", { class: "unseen" }), header, body); box.append(table);
  runs.replaceChildren(make("h2", "Executions" + (more_executions ? ", the last of " + number(executions.length + more_executions) : "")), box);
}
function output(id) {
  const tabs = make("div", null, { class: "tabs", role: "tablist", "aria-label": "Output" }), text = make("pre", "", { id: "output", tabindex: "0", role: "tabpanel", "aria-label": "output of the task" }), note = make("p", "", { class: "dim", role: "status" });
  const follow = (stream) => {
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.textContent === stream));
    if (logs) logs.close();
    text.textContent = ""; put(note, "reading");
    const mine = logs = new EventSource("/api/logs/" + encodeURIComponent(id) + "/" + stream);
    mine.again = () => follow(stream);
    mine.addEventListener("text", (event) => {
      const below = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      text.append(JSON.parse(event.data));
      if (text.textContent.length > 300000) text.textContent = text.textContent.slice(-200000);
      if (below) text.scrollTop = text.scrollHeight;
      put(note, "live");
    });
    mine.addEventListener("end", (event) => { mine.close(); mine.ended = true; put(note, JSON.parse(event.data).error || (text.textContent ? "the end" : "nothing was written")); });
    mine.onerror = () => { mine.close(); mine.ended = true; put(note, "the output cannot be read any more"); };
  };
  for (const stream of ["stdout", "stderr"]) tabs.append(button(stream, () => follow(stream), { role: "tab", "aria-selected": "false", "aria-controls": "output" }));
  follow("stdout");
  return card(make("h2", "Output"), tabs, text, note);
}
async function nodePage(name, at, seen) {
  let node;
  try { node = await get("/api/node/" + encodeURIComponent(name)); } catch (error) { if (!seen) refused(error, at); return; }
  if (at !== shownAt) return;
  const now = JSON.stringify(node), focus = document.activeElement.id;
  again = setTimeout(() => { if (at === shownAt) nodePage(name, at, now); }, 2000);
  if (now === seen) return;
  const actions = make("div", null, { class: "buttons" }), closed = node.state !== "up" && node.state !== "lost";
  actions.append(closed ? button("Resume", () => ask("Use node " + name + " again?", "It gets new tasks.", () => press("/api/resume", { nodes: [name] }).then(later)), { id: "resume" })
    : button("Drain", () => ask("Drain node " + name + "?", "It gets nothing new; what runs there goes on.", (reason) => press("/api/drain", { nodes: [name], reason }).then(later), { more: "reason, shown to others" }), { id: "drain" }));
  const later = () => setTimeout(reload, 1500);
  const head = card(heading("Node " + name), actions, facts([
    ["state", make("span", node.state, { class: "state " + node.state })], ["why", node.why || ""], ["host", node.host], ["cores", number(expand(node.cores).length) + ": " + node.cores + (node.shared ? ", some of which share a physical one" : "")],
    ["in use", number(node.used)], ["memory", node.memory ? bytes(node.memory_used || 0) + " asked for, of " + bytes(node.memory) : ""], ["GPUs", (node.gpus || []).map(([gpu, model]) => gpu + (model ? " " + model : "")).join("; ")],
  ]));
  const body = make("tbody"), table = make("table"), box = make("div", null, { class: "wide" }), top = make("tr"), header = make("thead");
  for (const word of ["task", "name", "cores", "runs for"]) top.append(make("th", word, { scope: "col" }));
  for (const one of node.executions.slice(0, 500)) {
    const line = make("tr"), cells = [make("td"), make("td", one.name), make("td", one.cores || "not started"), make("td", one.started ? duration(Date.now() / 1000 - one.started) : "")];
    cells[0].append(taskLink(one.id)); line.append(...cells); body.append(line);
  }
  header.append(top); table.append(make("caption", "What it has", { class: "unseen" }), header, body); box.append(table);
  const elements = Object.entries(node.elements || {}).map(([array, count]) => number(count) + " of " + array).join(", ");
  $("detail").replaceChildren(head, card(make("h2", "What it has"), node.executions.length ? box : make("p", "No task is named here.", { class: "dim" }), make("p", elements ? "short tasks of arrays and bundles, which have no record of their own: " + elements : "", { class: "dim" })));
  if (["drain", "resume"].includes(focus) && $(focus)) $(focus).focus();
}
async function findPage(words, at) {
  let answer;
  try { answer = await get("/api/search?q=" + encodeURIComponent(words)); } catch (error) { refused(error, at); return; }
  if (at !== shownAt) return;
  const { found, more } = answer;
  if (found.length === 1 && !more) { location.replace("#/task/" + encodeURIComponent(found[0][0])); return; }
  const list = make("ul");
  for (const [id, name, status, reason, command] of found) { const item = make("li"); item.append(taskLink(id), " " + name + " ", make("span", status, { class: "state " + status }), " " + reason + " ", make("span", command, { class: "dim" })); list.append(item); }
  $("detail").replaceChildren(card(heading("Found: " + words), found.length ? list : make("p", "No task has this id or this name."), make("p", more ? "and " + number(more) + " more" : "")));
}
$("search").addEventListener("submit", (event) => { event.preventDefault(); const word = $("q").value.trim(); if (word) { const hash = "#/find/" + encodeURIComponent(word); if (location.hash === hash) go(); else location.hash = hash; } });
$("pause").addEventListener("click", () => (state.pilot && state.pilot.paused
  ? ask("Start tasks again?", "What waits is handed out again.", () => press("/api/pause", { paused: false }))
  : ask("Pause the pilot?", "Nothing new starts; what runs goes on.", () => press("/api/pause", { paused: true }))));
$("stop").addEventListener("click", () => ask("End the pilot?", "Tasks that have not ended stay for `pilotq start --resume`. This page ends with it.", (_, mode) => press("/api/stop", { mode }),
  { choices: [["drain", "wait for what runs"], ["stop", "end what runs, with SIGTERM first"], ["now", "kill what runs at once"]] }));
document.addEventListener("keydown", (event) => { if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(event.target.tagName) && !$("ask").open) { event.preventDefault(); $("q").focus(); } });
get("/api/pilot").then((pilot) => { $("link").title = pilot.directory; }, () => {});
connect();
go();
