"use strict";
// Shows one node. Reads only; everything from the node enters the page as text, never as HTML.

const POLL_MS = 2000;
const POINTS = 400;
const KINDS = ["activation", "activation_gradient", "gradient", "reduced", "blob", "control"];
const PHASES = {
  training: "busy", evaluating: "busy", saving: "busy", placing: "warn", waiting: "warn",
  serving: "good", stopped: "", failed: "bad", "handed over": "",
};
const byId = (id) => document.getElementById(id);
const details = new Map(); // job -> the full view, refetched when the job moves on
const opened = new Set(); // which <details> the reader has opened
const drawn = new Map(); // part of the page -> the data that it shows

// ---- small helpers ---------------------------------------------------------------------------

function make(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const short = (peer) => `\u2026${peer.slice(-6)}`;
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "\u2013");

function scaled(value, units, base) {
  if (!known(value)) return "\u2013";
  let power = 0;
  while (Math.abs(value) >= base && power < units.length - 1) { value /= base; power += 1; }
  const digits = power === 0 && Number.isInteger(value) ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0;
  return `${value.toFixed(digits)} ${units[power]}`.trim();
}
const bytes = (value) => scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const count = (value) => scaled(value, ["", "k", "M", "G", "T"], 1000);

function duration(seconds) {
  if (!known(seconds)) return "\u2013";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

// ---- colours: a peer keeps its colour, whoever else comes or goes ------------------------------

const peerColours = new Map();
function peerColour(peer) {
  if (!peerColours.has(peer)) peerColours.set(peer, `var(--c${peerColours.size % 8})`);
  return peerColours.get(peer);
}
function kindColour(kind) {
  const at = KINDS.indexOf(kind);
  return `var(--c${at < 0 ? 7 : at})`;
}

// ---- parts of the page -------------------------------------------------------------------------

function tile(label, value, note) {
  const under = make("div", "note", note || " ");
  under.title = note || "";
  return make("div", "tile", make("div", "label", label), make("div", "value", value), under);
}

function showTiles(node, peers, jobs) {
  const running = jobs.filter((job) => !["stopped", "failed", "handed over"].includes(job.phase));
  const free = peers.reduce((sum, peer) => sum + peer.memory_free_bytes, 0);
  const dropped = Object.values(node.dropped).reduce((sum, number) => sum + number, 0);
  const worst = Object.entries(node.dropped).sort((a, b) => b[1] - a[1])[0];
  byId("tiles").replaceChildren(
    tile("Peers", String(peers.length), `${bytes(free)} of memory free`),
    tile("Jobs running", String(running.length), `${jobs.length} in all`),
    tile("Slots hosted here", String(node.hosted.length), node.device),
    tile("Dropped", count(dropped), worst ? `most: ${worst[0].replaceAll("_", " ")}` : "nothing"),
    tile("Up for", duration(node.uptime_s), `version ${node.version}`),
  );
}

function stat(label, value, note) {
  return make("div", "stat", make("div", "label", label), make("div", "value", value),
    make("div", "note", note || ""));
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const values = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) values.push(i * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => [value, value.toFixed(digits)]);
}

function lossCurve(job) {
  const points = job.losses
    .map((loss, i) => [job.losses.length < job.step
      ? Math.round(((i + 0.5) / job.losses.length) * job.step) : i + 1, loss])
    .filter(([, loss]) => known(loss));
  if (points.length < 2) return make("div", "empty", "the curve begins with the second step");
  const [width, height, left, right, top, bottom] = [720, 270, 44, 14, 12, 28];
  const values = points.map(([, loss]) => loss).concat(known(job.val_loss) ? [job.val_loss] : []);
  const spread = Math.max(...values) - Math.min(...values) || 1;
  const low = Math.max(0, Math.min(...values) - spread * 0.06);
  const high = Math.max(...values) + spread * 0.06;
  const last = Math.max(points[points.length - 1][0], 2);
  const x = (step) => left + ((step - 1) / (last - 1)) * (width - left - right);
  const y = (loss) => top + ((high - loss) / (high - low)) * (height - top - bottom);
  const svg = shape("svg", {
    class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Loss from ${fixed(points[0][1], 3)} to ${fixed(points.at(-1)[1], 3)} nats per token`,
  });
  for (const [value, text] of ticks(low, high, 5)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  for (const [value] of ticks(1, last, 6)) {
    if (value < 1 || !Number.isInteger(value)) continue;
    svg.append(shape("text", { x: x(value), y: height - 8, "text-anchor": "middle" }, String(value)));
  }
  const path = points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join("L");
  const base = height - bottom;
  svg.append(shape("path", { class: "area", d: `M${x(points[0][0])},${base}L${path}L${x(points.at(-1)[0])},${base}Z` }));
  svg.append(shape("path", { class: "line", d: `M${path}` }));
  if (known(job.val_loss)) {
    const at = y(job.val_loss);
    svg.append(shape("line", { class: "held", x1: left, x2: width - right, y1: at, y2: at }));
    const above = at - 8 > top + 10;
    svg.append(shape("text", { class: "held-text", x: left + 8, y: above ? at - 7 : at + 16 },
      `held-out ${fixed(job.val_loss, 3)}`));
  }
  svg.append(shape("circle", { class: "dot", r: 4.5, cx: x(points.at(-1)[0]), cy: y(points.at(-1)[1]) }));
  svg.append(pointer(svg, points, x, y, { width, left, right, top, base }));
  return svg;
}

function pointer(svg, points, x, y, box) {
  const group = shape("g", { visibility: "hidden" });
  const line = shape("line", { class: "cross", y1: box.top, y2: box.base });
  const dot = shape("circle", { class: "dot", r: 4.5 });
  const text = shape("text", { class: "tip", y: box.top + 4 });
  group.append(line, dot, text);
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const at = ((event.clientX - area.left) / area.width) * box.width;
    const near = points.reduce((best, each) =>
      (Math.abs(x(each[0]) - at) < Math.abs(x(best[0]) - at) ? each : best));
    const atX = x(near[0]);
    line.setAttribute("x1", atX); line.setAttribute("x2", atX);
    dot.setAttribute("cx", atX); dot.setAttribute("cy", y(near[1]));
    const flip = atX > box.width * 0.7;
    text.setAttribute("x", atX + (flip ? -8 : 8));
    text.setAttribute("text-anchor", flip ? "end" : "start");
    text.textContent = `step ${near[0]}: ${fixed(near[1], 4)}`;
    group.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => group.setAttribute("visibility", "hidden"));
  return group;
}

function placement(job, self) {
  if (!job.placement.length) return make("div", "empty", "not placed yet");
  const grid = make("div", "placement");
  const numSlots = job.placement[0].length;
  grid.style.gridTemplateColumns = `auto repeat(${numSlots}, minmax(62px, 1fr))`;
  if (numSlots > 1) {
    grid.append(make("div", "axis", ""));
    for (let slot = 0; slot < numSlots; slot += 1) grid.append(make("div", "axis", `slot ${slot}`));
  }
  job.placement.forEach((row, stage) => {
    const [start, stop] = job.layers[stage] || [0, 0];
    grid.append(make("div", "axis", `stage ${stage}, layers ${start}\u2013${stop - 1}`));
    for (const peer of row) {
      const here = peer === self;
      const cell = make("div", here ? "slot mono mine" : "slot mono", here ? "this node" : short(peer));
      cell.style.borderLeftColor = peerColour(peer);
      cell.title = peer;
      grid.append(cell);
    }
  });
  return grid;
}

function traffic(job) {
  const rank = (kind) => (KINDS.indexOf(kind) + KINDS.length + 1) % (KINDS.length + 1);
  const entries = Object.entries(job.bytes_by_kind).filter(([, number]) => number > 0)
    .sort((a, b) => rank(a[0]) - rank(b[0]));
  const total = entries.reduce((sum, [, number]) => sum + number, 0);
  if (!total) return make("div", "empty", "nothing sent yet");
  const bar = make("div", "bar");
  const legend = make("div", "legend");
  for (const [kind, number] of entries) {
    const piece = make("div");
    piece.style.background = kindColour(kind);
    piece.style.flexGrow = String(number / total);
    piece.title = `${kind}: ${bytes(number)}`;
    bar.append(piece);
    const swatch = make("div", "swatch");
    swatch.style.background = kindColour(kind);
    const part = (number / total) * 100;
    const share = part < 0.1 ? "< 0.1 %" : `${part.toFixed(part < 10 ? 1 : 0)} %`;
    legend.append(swatch, make("div", "", kind.replaceAll("_", " ")),
      make("div", "number", bytes(number)), make("div", "number", share));
  }
  return make("div", "", bar, legend);
}

function folded(key, title, lines) {
  const fold = make("details", "", make("summary", "", title),
    make("ul", "", ...lines.map((line) => make("li", "", line))));
  fold.open = opened.has(key);
  fold.addEventListener("toggle", () => (fold.open ? opened.add(key) : opened.delete(key)));
  return fold;
}

function jobCard(job, self) {
  const share = job.num_steps ? Math.min(1, job.step / job.num_steps) : 0;
  const left = share > 0 && share < 1 && known(job.tokens_per_s) && job.tokens_per_s > 0
    ? (job.tokens_total / job.step) * (job.num_steps - job.step) / job.tokens_per_s : null;
  const head = make("div", "head", make("h2", "", job.name),
    make("span", `badge ${PHASES[job.phase] || ""}`, job.phase),
    make("span", "mono quiet", job.job),
    make("span", "end", left === null ? `${duration(job.elapsed_s)} in all`
      : `${duration(job.elapsed_s)} so far, about ${duration(left)} to go`));
  const fill = make("div");
  fill.style.width = `${share * 100}%`;
  const drop = known(job.first_loss) && known(job.loss) ? `from ${fixed(job.first_loss, 2)}` : "";
  const saved = job.checkpoint_step === null ? "no checkpoint yet" : `saved ${job.checkpoint_step}`;
  const recovery = job.recoveries ? `last took ${duration(job.recovery_s)}` : "none needed";
  const trains = job.num_steps > 0;
  const stats = make("div", "stats", ...(trains ? [
    stat("Step", `${job.step} / ${job.num_steps}`, saved),
    stat("Loss (nats)", fixed(job.loss, 3), drop),
    stat("Held-out loss", fixed(job.val_loss, 3), ""),
    stat("Tokens per second", count(job.tokens_per_s), `${count(job.tokens_total)} in all`),
    stat("Step time", duration(job.step_s),
      known(job.predicted_step_s) ? `predicted ${duration(job.predicted_step_s)}` : ""),
  ] : []),
  stat("Recoveries", String(job.recoveries), recovery),
  stat("Generation", String(job.generation), "of the placement"));
  const placed = make("div", "", make("h3", "", "Placement"), placement(job, self));
  const sent = make("div", "", make("h3", "", "Bytes sent by all workers"), traffic(job));
  const body = trains
    ? make("div", "job", make("div", "", make("h3", "", "Loss by step"), lossCurve(job)),
      make("div", "side", placed, sent))
    : make("div", "job even", placed, sent);
  const reasons = job.plan_verdict
    ? [...job.plan_reasons, `Another placement was found: ${job.plan_verdict}`] : job.plan_reasons;
  const notes = reasons.length
    ? folded(`why-${job.job}`, "Why it is placed like this", reasons) : null;
  const lost = job.killed_peers.length
    ? folded(`lost-${job.job}`, `Lost workers: ${job.killed_peers.length}`, job.killed_peers) : null;
  return make("article", "card", head,
    job.reason ? make("p", "reason", job.reason) : null,
    trains ? make("div", "progress", fill) : null, stats, body, notes, lost);
}

function showJobs(jobs, self) {
  const cards = jobs.map((job) => jobCard(job, self));
  const text = "No job here. Start one with swarmnode submit job.toml";
  byId("jobs").replaceChildren(...(cards.length ? cards : [make("div", "card empty", text)]));
}

function peerTable(peers) {
  const names = ["Peer", "Device", "Matrix speed", "Memory free", "Cores", "Renews in"];
  const numeric = new Set([2, 4, 5]);
  const row = make("tr", "", ...names.map((name, i) => make("th", numeric.has(i) ? "number" : "", name)));
  const body = make("tbody");
  for (const peer of peers) {
    const dot = make("span", "meter");
    dot.style.width = "10px"; dot.style.height = "10px"; dot.style.background = peerColour(peer.peer);
    const name = make("td", "mono", dot, short(peer.peer), peer.is_self ? " (this node)" : "");
    name.title = peer.peer;
    const fill = make("div");
    fill.style.width = `${(peer.memory_free_bytes / Math.max(1, peer.memory_total_bytes)) * 100}%`;
    const speed = Math.max(0, ...Object.values(peer.flops));
    body.append(make("tr", "", name, make("td", "", peer.device),
      make("td", "number", `${count(speed)}FLOP/s`.replace(" ", " ")),
      make("td", "", make("span", "meter", fill), `${bytes(peer.memory_free_bytes)} of ${bytes(peer.memory_total_bytes)}`),
      make("td", "number", String(peer.num_cores)),
      make("td", "number", peer.is_self ? "\u2013" : duration(Math.max(0, peer.expires_in_s)))));
  }
  return make("div", "card", make("h2", "", "Peers"),
    make("div", "scroll", make("table", "", make("thead", "", row), body)));
}

function joinCard(node) {
  const command = `swarmnode up --join ${node.join_address}`;
  const code = make("code", "", command);
  code.title = command;
  const button = make("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
  });
  return make("div", "card", make("h2", "", "Add a machine"), make("div", "join", code, button));
}

function processCard(node) {
  const legend = make("div", "legend");
  const rows = [["Serves at", node.http_address], ["Home", node.home],
    ...Object.entries(node.pids).map(([role, pid]) => [role, `process ${pid}`]),
    ...Object.entries(node.dropped).map(([reason, number]) => [`dropped: ${reason.replaceAll("_", " ")}`, String(number)])];
  legend.style.gridTemplateColumns = "auto minmax(0, 1fr)";
  for (const [name, value] of rows) legend.append(make("div", "quiet", name), make("div", "mono", value));
  return make("div", "card", make("h2", "", "This node"), legend);
}

// ---- polling -------------------------------------------------------------------------------------

function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("token") || "";
}

class TokenError extends Error {}

async function ask(path) {
  const answer = await fetch(path, {
    headers: { authorization: `Bearer ${token()}` }, signal: AbortSignal.timeout(10000),
  });
  if (answer.status === 401) throw new TokenError("token");
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function detailed(job) {
  const before = details.get(job.job);
  if (!before || before.step !== job.step) {
    details.set(job.job, await ask(`/api/jobs/${job.job}?points=${POINTS}`));
  }
  return { ...job, losses: details.get(job.job).losses };
}

function onChange(part, data, show) {
  const text = JSON.stringify(data);
  if (drawn.get(part) !== text) { drawn.set(part, text); show(); }
}

function state(text, kind) {
  byId("state").textContent = text;
  byId("state").className = `state ${kind}`;
}

async function refresh() {
  const [node, peers, jobs] = await Promise.all([ask("/api/node"), ask("/api/peers"), ask("/api/jobs")]);
  const full = await Promise.all(jobs.map(detailed));
  for (const gone of [...details.keys()].filter((id) => !jobs.some((job) => job.job === id))) details.delete(gone);
  peers.sort((a, b) => b.is_self - a.is_self || (a.peer < b.peer ? -1 : 1));
  peers.forEach((peer) => peerColour(peer.peer));
  byId("peer").textContent = node.peer;
  showTiles(node, peers, jobs);
  onChange("jobs", full, () => showJobs(full, node.peer));
  onChange("more", [peers, { ...node, uptime_s: 0 }], () => byId("more").replaceChildren(
    peerTable(peers), make("div", "columns", joinCard(node), processCard(node))));
  byId("ask").hidden = true;
  state("live", "good");
}

async function poll() {
  if (!document.hidden) {
    try {
      await refresh();
    } catch (error) {
      if (error instanceof TokenError) {
        sessionStorage.removeItem("token");
        byId("ask").hidden = false;
        state("token needed", "warn");
        return; // the form or a new address starts it again
      }
      state("not reachable, trying again", "bad");
    }
  }
  setTimeout(poll, POLL_MS);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  byId("ask").hidden = true;
  state("connecting", "");
  poll();
});
window.addEventListener("hashchange", () => location.reload());
poll();
