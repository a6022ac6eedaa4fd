"use strict";

const POLL_MS = 330, TIMEOUT_MS = 5000, FIRST_RETRY_MS = 500, LAST_RETRY_MS = 10000;
const KEY = "fastserve-key"; // where sessionStorage keeps the API key
const SPAN_S = 60, SMOOTHING_S = 2; // what a sparkline shows, and the span of a rate
const MAX_LEVELS = 16; // rows of the queues; a policy may have more levels

const $ = (id) => document.getElementById(id);

// -- words and numbers ------------------------------------------------------------------------------------------------

const formats = [0, 1, 2, 3].map((digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const fixed = (value, digits) => formats[digits].format(value);
const count = (value) => fixed(value, 0);
const three = (value) => fixed(value, value >= 100 ? 0 : value >= 10 ? 1 : 2); // about three digits

function duration(seconds) {
  const s = Math.floor(seconds), min = Math.floor(s / 60), h = Math.floor(min / 60), d = Math.floor(h / 24);
  if (d) return `${d} d ${h % 24} h`;
  if (h) return `${h} h ${min % 60} min`;
  return min ? `${min} min ${s % 60} s` : `${s} s`;
}

// `value` bytes in the unit that suits `whole`, and that unit.
function bytes(value, whole = value) {
  const [size, unit] = whole >= 1e12 ? [1e12, "TB"] : whole >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
  return [fixed(value / size, 1), unit];
}

// -- elements ---------------------------------------------------------------------------------------------------------

// Unchanged text is not written, so that a selection stays and a screen reader is silent.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Makes `parent` hold one child an item, in order. A child is kept while its item's key is present.
function list(parent, items, keyOf, make, fill) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    const child = old.get(key) ?? make();
    old.delete(key);
    child.dataset.key = key;
    fill(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const child of old.values()) child.remove();
}

// A row whose first cell is its heading; `classes` has a class or nothing for each cell.
function row(classes) {
  const tr = document.createElement("tr");
  classes.forEach((name, index) => {
    const cell = document.createElement(index ? "td" : "th");
    if (!index) cell.scope = "row";
    cell.className = name;
    tr.append(cell);
  });
  return tr;
}

function number(cell, value, text = count(value)) {
  write(cell, text);
  cell.classList.toggle("zero", value === 0);
}

// Writes two parts; a narrow screen hides the one with the index `wide`.
function writeInTwo(cell, first, second, wide = 1) {
  if (!cell.children.length) cell.append(document.createElement("span"), document.createElement("span"));
  cell.children[wide].className = "wide";
  write(cell.children[0], first);
  write(cell.children[1], second);
}

function writeId(cell, id) {
  const prefix = id.match(/^((chat)?cmpl-)?/)[0];
  writeInTwo(cell, prefix, id.slice(prefix.length), 0);
  cell.title = id;
}

function segments(bar, parts, whole) {
  parts.forEach((part, index) => (bar.children[index].style.width = whole ? `${(100 * part) / whole}%` : "0"));
}

const KINDS = ["fresh", "resident", "away"];
const sizeOf = (queue) => queue.fresh + queue.resident + queue.away;

function merged(queues, level) {
  const sum = (kind) => queues.reduce((total, queue) => total + queue[kind], 0);
  return { level, fresh: sum("fresh"), resident: sum("resident"), away: sum("away") };
}

// The rows of the queues. With few levels: all from 0 to the deepest seen, so that rows keep their places. With many:
// those with requests, the last of them merged into one row.
let deepest = 0, many = false;
function levels(queues) {
  many ||= queues.some(({ level }) => level < 0 || level >= MAX_LEVELS);
  if (!many) {
    const by = new Map(queues.map((queue) => [queue.level, queue]));
    deepest = Math.max(deepest, ...by.keys());
    return Array.from({ length: deepest + 1 }, (_, level) => by.get(level) ?? merged([], level));
  }
  const there = queues.filter(sizeOf);
  if (there.length <= MAX_LEVELS) return there;
  const rest = there.slice(MAX_LEVELS - 1);
  return [...there.slice(0, MAX_LEVELS - 1), merged(rest, `${rest[0].level}–${rest.at(-1).level}`)];
}

// Which level is served now. Requests of a later level run while those of the first level wait for their caches or for
// room; the text says so, since the order looks wrong otherwise.
function order(queues, running) {
  const first = queues.filter(sizeOf).sort((a, b) => a.level - b.level)[0];
  const run = [...new Set(running.map(({ level }) => level))].sort((a, b) => a - b);
  if (!first || !run.length || run[0] <= first.level || typeof first.level !== "number") return "level 0 is served first";
  const why = [[first.away, "for their caches"], [first.fresh, "for room in the cache"], [first.resident, "for the next iteration"]];
  const waiting = why.filter(([number]) => number).map(([number, what]) => `${count(number)} wait ${what}`);
  const levels = run.length > 1 ? `levels ${run[0]} to ${run.at(-1)} run` : `level ${run[0]} runs`;
  return `level ${first.level}: ${waiting.join(", ")}; ${levels}`;
}

function showQueues(queues, running) {
  write($("queues-order"), order(queues, running));
  const shown = levels(queues);
  const longest = Math.max(8, ...shown.map(sizeOf));
  const step = 10 ** Math.floor(Math.log10(longest));
  const scale = [1, 1.5, 2, 3, 5, 10].map((times) => times * step).find((end) => end >= longest); // seldom changes
  const make = () => {
    const tr = row(["", "line", "", "", ""]);
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.ariaHidden = "true";
    bar.append(...KINDS.map((kind) => Object.assign(document.createElement("span"), { className: kind })));
    tr.cells[1].append(bar);
    return tr;
  };
  list($("queues").tBodies[0], shown, (queue) => queue.level, make, (tr, queue) => {
    write(tr.cells[0], String(queue.level));
    segments(tr.cells[1].firstElementChild, KINDS.map((kind) => queue[kind]), scale);
    KINDS.forEach((kind, index) => number(tr.cells[index + 2], queue[kind]));
  });
  const all = merged(queues);
  KINDS.forEach((kind, index) => number($("queues-all").cells[index + 2], all[kind]));
}

function showPool(element, { blocks, free }, state) {
  const used = blocks - free;
  const find = (name) => element.querySelector(name);
  const [all, unit] = bytes(blocks * state.block_bytes);
  write(find(".blocks"), `${count(used)} of ${count(blocks)} blocks`);
  write(find(".bytes"), `${bytes(used * state.block_bytes, blocks * state.block_bytes)[0]} of ${all} ${unit}`);
  write(find(".tokens"), `${count(used * state.block_size)} of ${count(blocks * state.block_size)} tokens`);
  const bar = find(".bar");
  bar.ariaValueMax = blocks;
  bar.ariaValueNow = used;
  bar.ariaValueText = `${used} of ${blocks} blocks`;
  segments(bar, [used], blocks);
}

function showRunning(running, places) {
  write($("running-count"), `${count(running.length)} of ${count(places)} places`);
  list($("places"), Array.from({ length: places }, (_, place) => place), (place) => place,
    () => document.createElement("span"), (span, place) => (span.className = place < running.length ? "taken" : ""));
  $("running-box").style.setProperty("--places", places);
  const body = $("running").tBodies[0];
  list(body, running, (request) => request.id, () => row(["id", "", "wide", "", "", ""]), (tr, request) => {
    writeId(tr.cells[0], request.id);
    write(tr.cells[1], String(request.level));
    number(tr.cells[2], request.prompt_tokens);
    number(tr.cells[3], request.output_tokens);
    write(tr.cells[4], fixed(request.age_s, 1));
    number(tr.cells[5], request.preemptions);
  });
  $("running-box").querySelector(".nothing").hidden = running.length > 0;
}

function showRecent(recent, now) {
  const body = $("recent").tBodies[0];
  const make = () => row(["id", "word state", "wide", "", "", "", "wide", "wide"]);
  list(body, recent, (request) => request.id, make, (tr, request) => {
    writeId(tr.cells[0], request.id);
    tr.cells[1].dataset.state = request.status;
    writeInTwo(tr.cells[1], request.status, request.status === "finished" ? `: ${request.finish_reason}` : "");
    number(tr.cells[2], request.prompt_tokens);
    number(tr.cells[3], request.output_tokens);
    write(tr.cells[4], request.ttft_s === null ? "–" : fixed(request.ttft_s, 2));
    write(tr.cells[5], fixed(request.jct_s, 2));
    number(tr.cells[6], request.preemptions);
    write(tr.cells[7], count(Math.max(0, now - request.finished_s)));
  });
  body.closest(".scroll").querySelector(".nothing").hidden = recent.length > 0;
}

// -- the last minute --------------------------------------------------------------------------------------------------

let samples = []; // {at, totals, ttft, sizes} of the last minute, oldest first

const inAll = (totals, name) => `${count(totals[name])} in all`;
// A tile shows a rate, the growth of `of`, or a `value`. `detail` takes the totals and the latencies.
const TILES = [
  { name: "output_tokens", label: "Output tokens/s", of: (totals) => totals.output_tokens, detail: (totals) => inAll(totals, "output_tokens") },
  {
    name: "ttft", label: "P95 TTFT, s", value: (sample) => sample.ttft,
    detail: (totals, { ttft_s }) => (ttft_s.count ? `P50 ${three(ttft_s.p50)}, ${count(ttft_s.count)} requests` : "no request"),
  },
  { name: "requests", label: "New requests/s", of: (totals) => totals.requests, detail: (totals) => inAll(totals, "requests") },
  { name: "preemptions", label: "Preemptions/s", of: (totals) => totals.preemptions, detail: (totals) => `${inAll(totals, "preemptions")}, ${count(totals.iterations)} iterations` },
  {
    name: "swap", label: "Swapped MB/s", of: (totals) => (totals.swap_out_bytes + totals.swap_in_bytes) / 1e6,
    detail: (totals) => `${bytes(totals.swap_out_bytes).join(" ")} out, ${bytes(totals.swap_in_bytes).join(" ")} in`,
  },
];
for (const { name, label } of TILES) {
  const tile = $("rate").content.firstElementChild.cloneNode(true);
  tile.dataset.rate = name;
  tile.querySelector("h3").textContent = label;
  $("rates").append(tile);
}

function remember(state) {
  const last = samples.at(-1);
  const fell = ({ of }) => of && of(state.totals) < of(last.totals);
  const restarted = last && (state.uptime_s < last.at || TILES.some(fell));
  if (restarted) {
    samples = [];
    [deepest, many] = [0, false];
  }
  if (restarted || !last || state.uptime_s > last.at) {
    samples.push({ at: state.uptime_s, totals: state.totals, ttft: state.last_minute.ttft_s.p95, sizes: merged(state.queues) });
  }
  samples = samples.filter(({ at }) => at >= state.uptime_s - SPAN_S - SMOOTHING_S);
}

// [time, rate] for each sample but the first; a rate is of the two seconds before.
function ratesOf(of) {
  let from = 0;
  return samples.slice(1).map(({ at, totals }, index) => {
    while (from < index && samples[from + 1].at <= at - SMOOTHING_S) from++;
    return [at, (of(totals) - of(samples[from].totals)) / (at - samples[from].at)];
  });
}

const valuesOf = (value) => samples.map((sample) => [sample.at, value(sample)]).filter(([, found]) => found !== null);

function showTiles(totals, latencies) {
  const end = samples.at(-1).at;
  for (const { name, label, of, value, detail } of TILES) {
    const tile = document.querySelector(`[data-rate="${name}"]`);
    const shown = (of ? ratesOf(of) : valuesOf(value)).filter(([at]) => at >= end - SPAN_S);
    const current = shown.length && shown.at(-1)[0] === end ? three(shown.at(-1)[1]) : "–";
    const highest = Math.max(...shown.map(([, height]) => height), 0);
    const points = shown.map(([at, height]) => `${(at - end + SPAN_S).toFixed(2)},${(20 - (highest && (20 * height) / highest)).toFixed(2)}`);
    write(tile.querySelector(".now"), current);
    write(tile.querySelector(".most"), shown.length ? three(highest) : "");
    write(tile.querySelector(".detail"), detail(totals, latencies));
    tile.querySelector("polyline").setAttribute("points", points.join(" "));
    const corners = points.length ? [`${points[0].split(",")[0]},20`, ...points, `${SPAN_S},20`] : [];
    tile.querySelector("polygon").setAttribute("points", corners.join(" "));
    tile.querySelector("svg").ariaLabel = `${label} in the last minute: now ${current}, at most ${three(highest)}`;
  }
}

// Unfinished requests, stacked: those with their caches on the GPU, then those on the host, then those without a cache.
function showChart() {
  const end = samples.at(-1).at;
  const shown = samples.filter(({ at }) => at >= end - SPAN_S);
  const highest = Math.max(...shown.map(({ sizes }) => sizeOf(sizes)), 0);
  const top = Math.max(highest, 1);
  const point = (at, height) => `${(at - end + SPAN_S).toFixed(2)},${(100 - (100 * height) / top).toFixed(2)}`;
  let below = shown.map(() => 0);
  for (const kind of ["resident", "away", "fresh"]) {
    const above = shown.map(({ sizes }, index) => below[index] + sizes[kind]);
    const outline = [...shown.map(({ at }, index) => point(at, above[index])), ...shown.map(({ at }, index) => point(at, below[index])).reverse()];
    $("chart").querySelector(`.${kind}`).setAttribute("points", outline.join(" "));
    below = above;
  }
  write($("chart").querySelector(".most"), count(top));
  $("chart").querySelector("svg").ariaLabel = `Unfinished requests in the last minute: now ${count(sizeOf(shown.at(-1).sizes))}, at most ${count(highest)}`;
}

const LATENCIES = [["ttft_s", "To the first token"], ["tpot_s", "Per token after it"], ["jct_s", "To the last token"]];

function showLatencies(latencies) {
  list($("latencies").tBodies[0], LATENCIES, ([name]) => name, () => row(["", "", "", "", "", ""]), (tr, [name, label]) => {
    write(tr.cells[0], label);
    ["mean", "p50", "p95", "p99"].forEach((key, index) => {
      const value = latencies[name][key];
      write(tr.cells[index + 1], value === null ? "–" : fixed(value, value < 1 ? 3 : 2));
    });
    number(tr.cells[5], latencies[name].count);
  });
}

// -- the whole state --------------------------------------------------------------------------------------------------

function show(state) {
  document.title = `${state.model} · FastServe`;
  write($("model"), state.model);
  write($("policy"), state.policy);
  write($("status"), state.status);
  $("status").dataset.status = state.status;
  write($("uptime"), duration(state.uptime_s));
  write($("error"), state.error);
  $("error").hidden = !state.error;
  remember(state);
  showTiles(state.totals, state.last_minute);
  showChart();
  showLatencies(state.last_minute);
  showQueues(state.queues, state.running);
  showPool($("gpu"), state.gpu, state);
  showPool($("host"), state.host, state);
  write($("moving"), `blocks moving: ${count(state.moving.out)} out, ${count(state.moving.in)} in`);
  showRunning(state.running, state.max_batch_size);
  showRecent(state.recent, state.now_s);
  const { finished, aborted, failed } = state.totals;
  write($("ended-count"), `in all ${count(finished)} finished, ${count(aborted)} aborted, ${count(failed)} failed`);
}

// -- polling: one request at a time, none while the tab is hidden or the key form is shown ----------------------------

let timer, polling = false, failures = 0;

function connection(word) {
  document.body.dataset.connection = word;
  $("connection").hidden = word !== "lost";
  $("key-form").hidden = word !== "locked";
}

function pollIn(ms) {
  clearTimeout(timer);
  if (!document.hidden && document.body.dataset.connection !== "locked") timer = setTimeout(poll, ms);
}

function lost(why) {
  if (!failures) {
    write($("connection-text"), `Connection lost at ${new Date().toLocaleTimeString()}: ${why}. Trying again.`);
  }
  connection("lost");
  pollIn(Math.min(FIRST_RETRY_MS * 2 ** failures++, LAST_RETRY_MS));
}

function askForKey(refused) {
  sessionStorage.removeItem(KEY);
  write($("key-error"), refused ? "The server does not accept this key." : "");
  connection("locked");
  $("key").focus();
}

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(timer);
  try {
    await pollOnce(sessionStorage.getItem(KEY));
  } finally {
    polling = false;
  }
}

async function pollOnce(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try {
    answer = await fetch("page/state", { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch {
    return lost("the server does not answer");
  }
  if (answer.status === 401) return askForKey(key !== null);
  if (!answer.ok) return lost(`the server answers ${answer.status}`);
  try {
    show(await answer.json());
  } catch (error) {
    return lost(`the server's answer is not a state (${error.message})`);
  }
  failures = 0;
  connection("live");
  pollIn(POLL_MS);
}

document.addEventListener("visibilitychange", () => pollIn(0));
$("retry").addEventListener("click", () => pollIn(0));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  poll();
});
pollIn(0);
