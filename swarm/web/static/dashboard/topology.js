// The peers of one model as a picture: over its blocks, or by distance; measured links, and the best route from here.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { blocks, color, number, prepare, seconds, shortId } from "../shared/ui.js";
import { byBlocks, byDistance } from "./layout.js";
import { bestRoute, empty, peerLink, problemNotice, states } from "./parts.js";

const MAX_LINKS = 400;
const MAX_LISTED = 100;
const tone = { good: "--good", warn: "--warn-fill", bad: "--bad-fill", "": "--strong-line" };

let picture = null; // {items, byPeer, numBlocks, …} of what was drawn last

/** Items that stand for `peerId`, whatever they hold. */
function place(rows, model, topology, mode, width, height) {
  const places = new Map(topology.nodes.map((node) => [node.peer_id, node.place]));
  const drawn = mode === "blocks" ? byBlocks(rows, model.num_blocks, width) : byDistance(rows, places, width, height);
  const byPeer = new Map();
  for (const item of drawn.items)
    for (const peer of item.peers) if (!byPeer.has(peer.peer_id)) byPeer.set(peer.peer_id, item);
  return { height, ...drawn, byPeer };
}

const center = (item) => [item.x + item.w / 2, item.y + item.h / 2];

function worst(item) {
  const kinds = item.peers.map((peer) => states[peer.state]?.[1] ?? "");
  return kinds.every((kind) => kind === "good")
    ? "good"
    : item.peers.length === 1
      ? kinds[0]
      : kinds.some((kind) => kind === "good")
        ? "good"
        : kinds[0];
}

/** Draw into `canvas`; called after each render of the page. */
export function drawTopology(canvas, { live, model, topology, mode, selected }) {
  const rows = [...live.peers.values()].filter((row) => row.model_id === model.model_id && !row.gone_at_s);
  const width = canvas.clientWidth;
  const planned = place(
    rows,
    model,
    topology,
    mode,
    width,
    mode === "blocks" ? 0 : Math.min(560, Math.max(320, width * 0.6)),
  );
  if (canvas.style.height !== `${planned.height}px`) canvas.style.height = `${planned.height}px`;
  const { context, height } = prepare(canvas);
  const { items, byPeer } = planned;
  picture = { ...planned, route: model.route ?? [] };
  const onRoute = new Set(picture.route.map((hop) => byPeer.get(hop.peer_id)));

  if (mode === "blocks") ruler(context, planned, model.num_blocks, height);
  links(context, byPeer, topology.links, selected, items.length);
  for (const item of items) {
    const ink = color(tone[worst(item)]);
    const pale = onRoute.size > 0 && !onRoute.has(item) && item.key !== selected;
    context.globalAlpha = pale ? 0.5 : 1;
    context.fillStyle = ink;
    context.beginPath();
    context.roundRect(item.x, item.y, item.w, item.h, mode === "blocks" ? 4 : item.h / 2);
    context.fill();
    context.globalAlpha = 1;
    if (item.key === selected) outline(context, item, color("--text"), mode);
    label(context, item, { mode, width, pale, crowded: items.some(({ peers }) => peers.length > 1) });
  }
  routeLine(context, picture, mode, width, height);
}

function outline(context, item, ink, mode) {
  context.strokeStyle = ink;
  context.lineWidth = 2.5;
  context.beginPath();
  context.roundRect(item.x - 2, item.y - 2, item.w + 4, item.h + 4, mode === "blocks" ? 6 : item.h / 2 + 2);
  context.stroke();
}

function ruler(context, { left, scale }, numBlocks, height) {
  const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find((each) => each * scale >= 28) ?? 128;
  context.font = "11px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (let at = 0; at <= numBlocks; at += step) {
    const x = left + at * scale - 1.5;
    context.strokeStyle = color("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, 24);
    context.lineTo(x, height - 8);
    context.stroke();
    context.fillStyle = color("--soft");
    if (at < numBlocks) context.fillText(String(at), x + (scale * Math.min(step, 1)) / 2 + 2, 16);
  }
}

function label(context, item, { mode, width, pale, crowded }) {
  const only = item.peers.length === 1;
  const text = only ? item.peers[0].name || shortId(item.peers[0].peer_id) : number(item.peers.length);
  context.font = "600 11px sans-serif";
  context.textBaseline = "middle";
  const [x, y] = center(item);
  if (mode === "blocks" || !only) {
    context.textAlign = "center";
    context.fillStyle = color(pale ? "--text" : "--card");
    let shown = text;
    while (shown.length > 1 && context.measureText(shown).width > item.w - 6) shown = shown.slice(0, -1);
    if (shown.length === text.length || shown.length > 3)
      context.fillText(shown === text ? shown : `${shown.slice(0, -1)}…`, x, y + 0.5);
  } else if (!crowded) {
    context.fillStyle = color("--text");
    const right = x > width * 0.7;
    context.textAlign = right ? "right" : "left";
    context.fillText(text.slice(0, 24), right ? item.x - 5 : item.x + item.w + 5, y);
  }
}

function links(context, byPeer, all, selected, count) {
  const seen = new Set();
  const shown = all.filter(({ a, b }) => {
    const [one, other] = [byPeer.get(a), byPeer.get(b)];
    if (!one || !other || one === other) return false;
    if (selected ? one.key !== selected && other.key !== selected : count > 40) return false;
    const pair = one.key < other.key ? `${one.key} ${other.key}` : `${other.key} ${one.key}`;
    return !seen.has(pair) && seen.add(pair);
  });
  context.lineWidth = 1;
  context.strokeStyle = color("--strong-line");
  context.globalAlpha = selected ? 0.8 : 0.4;
  for (const { a, b } of shown.slice(0, MAX_LINKS)) {
    const [ax, ay] = center(byPeer.get(a));
    const [bx, by] = center(byPeer.get(b));
    const bend = Math.min(40, Math.hypot(bx - ax, by - ay) / 5);
    context.beginPath();
    context.moveTo(ax, ay);
    context.quadraticCurveTo((ax + bx) / 2, (ay + by) / 2 - bend, bx, by);
    context.stroke();
  }
  context.globalAlpha = 1;
}

function routeLine(context, { route, byPeer, left, scale, items }, mode, width, height) {
  if (!route.length) return;
  const ink = color("--accent");
  context.strokeStyle = ink;
  context.fillStyle = ink;
  context.lineWidth = 3;
  context.lineJoin = "round";
  const points = [];
  for (const hop of route) {
    const item = byPeer.get(hop.peer_id);
    if (!item) continue;
    if (mode === "blocks") {
      const y = item.y + item.h + 2;
      points.push([left + hop.span[0] * scale - 1.5, y], [left + hop.span[1] * scale - 1.5, y]);
    } else points.push(center(item));
  }
  if (mode === "blocks") {
    const y = points[0]?.[1] ?? 40;
    points.unshift([left / 2, y]);
    points.push([width - left / 2, points.at(-1)[1]]);
  }
  context.beginPath();
  points.forEach(([x, y], at) => (at ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
  if (mode === "blocks") {
    context.font = "600 11px sans-serif";
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    for (const [x, y] of [points[0], points.at(-1)]) {
      context.beginPath();
      context.arc(x, y, 5, 0, 7);
      context.fill();
      context.fillText("you", x, y - 10);
    }
  } else {
    const steps = new Map();
    route.forEach((hop, at) => {
      const item = byPeer.get(hop.peer_id);
      if (item) steps.set(item, [...(steps.get(item) ?? []), at + 1]);
    });
    context.font = "600 11px sans-serif";
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    for (const [item, numbers] of steps) {
      outline(context, item, ink, mode);
      context.fillText(`hop ${numbers.join(", ")}`, item.x + item.w / 2, item.y - 8);
    }
  }
}

function itemAt(x, y) {
  const near = 6;
  return (
    picture?.items.findLast(
      (item) => x >= item.x - near && x <= item.x + item.w + near && y >= item.y - near && y <= item.y + item.h + near,
    ) ?? null
  );
}

const describe = (item) =>
  item.peers.length === 1
    ? `${item.peers[0].name || shortId(item.peers[0].peer_id)}, ${states[item.peers[0].state]?.[0]}`
    : `${item.peers.length} peers${item.span ? ` with blocks ${blocks(item.span)}` : " near one another"}`;

export function topologyPage({ live, model, topology, mode, setMode, selected, select, open }) {
  if (!model) return empty("Nothing to draw", html`Nobody serves here yet: <a href="#/join">join</a>.`);
  if (topology instanceof Error) return problemNotice(topology.message);
  if (!topology) return html`<p class="soft loading">Reading…</p>`;
  const item = picture?.items.find(({ key }) => key === selected) ?? null;
  const choose = (found) => {
    if (found && found.key === selected && found.peers.length === 1) open(found.peers[0].peer_id);
    else select(found?.key ?? null);
  };
  const clicked = (event) => {
    const found = itemAt(event.offsetX, event.offsetY);
    if (found?.peers.length === 1) open(found.peers[0].peer_id);
    else select(found?.key ?? null);
  };
  const moved = (event) => {
    const found = itemAt(event.offsetX, event.offsetY);
    event.target.title = found ? describe(found) : "";
    event.target.style.cursor = found ? "pointer" : "default";
  };
  const pressed = (event) => {
    const items = picture?.items ?? [];
    const at = items.findIndex(({ key }) => key === selected);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      select(items[(at + step + items.length) % items.length]?.key ?? null);
    } else if (event.key === "Enter" && item) choose(item);
    else if (event.key === "Escape") select(null);
  };
  return html`
    <h1 class="hidden">Topology</h1>
    <div class="filters">
      <div class="choice" role="group" aria-label="Arranged">
        <button class="quiet" aria-pressed=${mode === "blocks"} @click=${() => setMode("blocks")}>By blocks</button>
        <button class="quiet" aria-pressed=${mode === "distance"} @click=${() => setMode("distance")}>
          By distance
        </button>
      </div>
      <span class="small soft"
        >${mode === "blocks" ? "Each bar is a peer over the blocks that it holds." : "The nearer two peers stand, the shorter the round trip between them."}
        The line is the best route from here.</span
      >
    </div>
    <div class="card picture">
      <canvas
        id="topology"
        tabindex="0"
        role="application"
        aria-roledescription="map of peers"
        aria-describedby="picture-now"
        aria-label=${`${number(model.states.online)} peers and the best route. Arrow keys go from one to the next, Enter opens it.`}
        @click=${clicked}
        @mousemove=${moved}
        @keydown=${pressed}
      ></canvas>
      <p id="picture-now" class="hidden" aria-live="polite">${item ? describe(item) : ""}</p>
      <ul class="legend tiny soft">
        <li><span class="mark good"></span> online</li>
        <li><span class="mark warn"></span> paused or leaving</li>
        <li><span class="mark route"></span> best route</li>
        <li>numbers: so many peers together</li>
        ${topology.links.length ? html`<li>thin lines: measured links${picture && picture.items.length > 40 ? " of what is chosen" : ""}</li>` : nothing}
      </ul>
    </div>
    ${
      item
        ? html`<section class="card">
            <div class="head">
              <h2>${describe(item)}</h2>
              <button class="quiet" @click=${() => select(null)}>Close</button>
            </div>
            <ul class="chosen">
              ${item.peers.slice(0, MAX_LISTED).map((peer) => html`<li>${peerLink(peer)} <span class="soft small">${seconds(peer.decode_s_per_block)} per block, ${peer.rtt_s === null || peer.rtt_s === undefined ? "never answered" : `${seconds(peer.rtt_s)} away`}</span></li>`)}
            </ul>
            ${item.peers.length > MAX_LISTED ? html`<p class="small soft">and ${number(item.peers.length - MAX_LISTED)} more</p>` : nothing}
          </section>`
        : nothing
    }
    <section class="card">
      <h2>Best route from here</h2>
      ${bestRoute(model)}
    </section>
  `;
}
