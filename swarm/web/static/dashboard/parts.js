// What several of the dashboard's pages show: states, names, ages, the strip of blocks.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { repeat } from "../vendor/lit-html/directives/repeat.js";
import { blocks, copy, duration, icon, shortId } from "../shared/ui.js";

/** How each state is shown: never by colour alone. */
export const states = {
  online: ["online", "good", "●"],
  joining: ["joining", "", "◔"],
  paused: ["paused", "warn", "❙❙"],
  draining: ["leaving", "warn", "◒"],
  left: ["left", "", "○"],
  lost: ["lost", "bad", "✕"],
};

export function statePill(state) {
  const [name, tone, sign] = states[state] ?? [state, "", "?"];
  return html`<span class="pill ${tone}"><span aria-hidden="true">${sign}</span>${name}</span>`;
}

/** A peer by the name that it gave itself, if any, and the end of its id, which it cannot choose. */
function peerName({ peer_id: id, name }) {
  return html`${name ? html`<bdi class="name" title=${name}>${name}</bdi> ` : nothing}<span
      class="mono soft"
      title=${id}
      >${shortId(id)}</span
    >`;
}

export const peerLink = (peer) =>
  html`<a class="peer" href=${`#/peers/${encodeURIComponent(peer.peer_id)}`}>${peerName(peer)}</a>`;

export const bestRoute = (model) =>
  model.route
    ? html`<ol class="route">
        ${model.route.map((hop) => html`<li>${peerLink(hop)} <span class="small soft">blocks ${blocks(hop.span)}</span></li>`)}
      </ol>`
    : html`<p class="soft">There is none: ${model.route_problem || "blocks are missing"}.</p>`;

export const spansText = (spans) => spans.map(blocks).join(", ") || "none";

export function age(seconds) {
  if (seconds === null) return "never";
  return seconds < 1.5 ? "now" : `${duration(seconds)} ago`;
}

const time = new Intl.DateTimeFormat([], { timeStyle: "medium" });
const day = new Intl.DateTimeFormat([], { month: "short", day: "numeric" });

/** The time of day, with the day where it is not today's. */
export function when(atS, nowS) {
  const [then, now] = [new Date(atS * 1000), new Date(nowS * 1000)];
  return then.toDateString() === now.toDateString() ? time.format(then) : `${day.format(then)} ${time.format(then)}`;
}

/** In one sentence, how a model is: [tone, sign, words]. */
export function modelHealth(model) {
  const list = (spans) =>
    spans.length > 4 ? `${spans.slice(0, 4).map(blocks).join(", ")} and more` : spansText(spans);
  if (model.gaps.length) return ["bad", "✕", `Nobody holds blocks ${list(model.gaps)}: the model cannot answer.`];
  if (model.single.length)
    return ["warn", "!", `Blocks ${list(model.single)} have a single holder: if it leaves, there is a gap.`];
  return ["good", "✓", `Every block has at least ${model.replication} holders.`];
}

/** One cell per block with its number of holders. Gaps are red and hatched, single holders amber and dotted. */
export function strip(model) {
  const most = Math.max(...model.holders, 2);
  return html`<ol class="strip" aria-label="Holders of each block">
      ${model.holders.map((count, at) => {
        const kind = count === 0 ? "gap" : count === 1 ? "single" : "many";
        const words = `Block ${at}: ${count === 0 ? "nobody, a gap" : count === 1 ? "a single holder" : `${count} holders`}`;
        const depth = count > 1 ? 18 + Math.round((42 * Math.log(count)) / Math.log(most)) : 0;
        return html`<li class=${kind} .style=${count > 1 ? `--depth:${depth}%` : ""} title=${words} aria-label=${words}>
          <span aria-hidden="true">${count}</span>
        </li>`;
      })}
    </ol>
    <ul class="legend tiny soft" aria-hidden="true">
      <li><span class="cell gap">0</span> gap: nobody holds it</li>
      <li><span class="cell single">1</span> a single holder</li>
      <li><span class="cell many">2+</span> holders; darker is more</li>
    </ul>`;
}

const copied = new Set();

/** A text to be taken along, with a button that copies it. `update` draws the page again. */
export function takeaway(text, label, update) {
  const take = async () => {
    if (!(await copy(text))) return;
    copied.add(text);
    update();
    setTimeout(() => {
      copied.delete(text);
      update();
    }, 1500);
  };
  return html`<div class="takeaway">
    <code tabindex="0" aria-label=${label}>${text}</code>
    <button @click=${take} aria-label=${`Copy ${label}`}>
      ${icon(copied.has(text) ? "check" : "copy")} ${copied.has(text) ? "Copied" : "Copy"}
    </button>
  </div>`;
}

export const problemNotice = (problem) => html`<p class="notice bad" role="alert">${problem}</p>`;
export const empty = (title, text) =>
  html`<div class="card empty">
    <h2>${title}</h2>
    <p class="soft">${text}</p>
  </div>`;

const signs = {
  joined: "+",
  returned: "↻",
  left: "−",
  lost: "✕",
  moved: "⇄",
  paused: "❙❙",
  resumed: "▸",
  gap_opened: "▨",
  gap_healed: "✓",
};
const tones = {
  joined: "good",
  returned: "good",
  resumed: "good",
  gap_healed: "good",
  lost: "bad",
  gap_opened: "bad",
  paused: "warn",
};
export const kindName = (kind) => kind.replace("_", " ");

export const eventList = (events, nowS) =>
  html`<ol class="events">
    ${repeat(
      events,
      ({ id }) => id,
      (event) => eventItem(event, nowS),
    )}
  </ol>`;

function eventItem(event, nowS) {
  return html`<li class="event">
    <time class="num soft small" datetime=${new Date(event.at_s * 1000).toISOString()}>${when(event.at_s, nowS)}</time>
    <span class="pill ${tones[event.kind] ?? ""}"
      ><span aria-hidden="true">${signs[event.kind] ?? "·"}</span>${kindName(event.kind)}</span
    >
    <span class="event-text"
      >${event.peer_id ? html`<a href=${`#/peers/${encodeURIComponent(event.peer_id)}`}><bdi>${event.text}</bdi></a>` : html`<bdi>${event.text}</bdi>`}</span
    >
    <span class="soft small event-model"><bdi>${event.model_name}</bdi></span>
  </li>`;
}
