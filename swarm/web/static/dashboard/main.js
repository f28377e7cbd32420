// The dashboard: which page is open, what it has asked for, and when it is drawn again. `live` brings what changes.

import { html, nothing, render } from "../vendor/lit-html/lit-html.js";
import { announce } from "../shared/announce.js";
import { icon, onceAFrame, themeButton } from "../shared/ui.js";
import { drawCharts, forgetCharts } from "./charts.js";
import { eventsPage, eventsPath, noQuery } from "./events.js";
import { joinPage } from "./join.js";
import { ask, Live } from "./live.js";
import { overviewPage } from "./overview.js";
import { age } from "./parts.js";
import { peerPage } from "./peer.js";
import { noFilter, peersPage } from "./peers.js";
import { drawTopology, topologyPage } from "./topology.js";

const app = document.querySelector("#app");
const HISTORY_MS = 15000;
const PEER_MS = 2000;
const TOPOLOGY_MS = 5000;
const SEARCH_MS = 250;
const MAX_EVENTS = 2000;

const pages = [
  ["", "Overview"],
  ["peers", "Peers"],
  ["topology", "Topology"],
  ["events", "Events"],
  ["join", "Join"],
];

const state = {
  page: "",
  peerId: null,
  modelId: null, // chosen by hand; null: the one with most peers
  asked: {}, // what pages asked for, by name: an answer, an Error, or undefined while it is on its way
  hours: 6,
  filter: { ...noFilter },
  query: { ...noQuery },
  mode: "blocks",
  selected: null,
  checking: false,
  checked: null,
};

const live = new Live(changed);

// --- what a page asks for ---

const timers = new Map();

/**
 * Ask now, and again every `everyMs` while the page is open; the newest question's answer counts. What was known stays
 * while the dashboard cannot be reached: how old it is stands beside it.
 */
function follow(name, path, everyMs) {
  clearTimeout(timers.get(name)?.timer);
  const turn = {};
  timers.set(name, turn);
  const again = async () => {
    let answer;
    try {
      answer = await ask(path);
    } catch (error) {
      answer = error.status === 0 ? (state.asked[name] ?? error) : error;
    }
    if (timers.get(name) !== turn) return;
    state.asked[name] = answer;
    update();
    if (everyMs) turn.timer = setTimeout(again, everyMs);
  };
  again();
}

function unfollow() {
  for (const turn of timers.values()) clearTimeout(turn.timer);
  timers.clear();
}

function chosenModel() {
  const models = live.overview?.models ?? [];
  return models.find((model) => model.model_id === state.modelId) ?? models[0] ?? null;
}

let askedFor = "";

/** Ask for what the open page needs, if that is not being asked for already. */
function askForPage() {
  const model = chosenModel();
  const wanted = [state.page, state.peerId, model?.model_id, state.hours].join(" ");
  if (wanted === askedFor || !live.overview) return;
  askedFor = wanted;
  unfollow();
  if (state.page === "" && model) follow("history", `history?model=${model.model_id}&hours=${state.hours}`, HISTORY_MS);
  if (state.page === "peers" && state.peerId) follow("peer", `peers/${encodeURIComponent(state.peerId)}`, PEER_MS);
  if (state.page === "topology" && model) follow("topology", `topology?model=${model.model_id}`, TOPOLOGY_MS);
  if (state.page === "events") askForEvents({ anew: true });
  if (state.page === "join") follow("join", "join", 0);
}

let searching;
let eventsTurn = 0;

/** The newest events that fit the query, or those `before` one; they join those that are shown, unless `anew`. */
async function askForEvents({ anew = false, before = null } = {}) {
  if (anew) eventsTurn += 1;
  const turn = eventsTurn;
  let found;
  try {
    found = await ask(eventsPath(state.query, state.modelId && chosenModel(), before));
  } catch (error) {
    found = error;
  }
  if (turn !== eventsTurn || state.page !== "events") return;
  const known = state.asked.events;
  if (found instanceof Error) state.asked.events = anew || !known ? found : known;
  else if (anew || !known || known instanceof Error) state.asked.events = found;
  else {
    const all = new Map([...known.events, ...found.events].map((event) => [event.id, event]));
    const events = [...all.values()].sort((one, other) => other.id - one.id).slice(0, MAX_EVENTS);
    state.asked.events = { events, more: (before === null ? known.more : found.more) && events.length < MAX_EVENTS };
  }
  update();
}

async function check(whom) {
  state.checking = true;
  state.checked = null;
  update();
  try {
    state.checked = await ask("reachability", whom);
  } catch (error) {
    state.checked = error;
  }
  state.checking = false;
  update();
}

// --- what happens ---

let knownEventId = null;

function changed() {
  if (live.overview) {
    const news = knownEventId === null ? [] : live.events.filter((event) => event.id > knownEventId);
    if (knownEventId !== live.latestEventId && state.page === "events" && knownEventId !== null) askForEvents();
    knownEventId = live.latestEventId;
    for (const event of news.filter(({ kind }) => kind.startsWith("gap")).slice(0, 3)) announce(event.text);
  }
  update();
}

function goTo() {
  const [page = "", peerId = null] = location.hash.replace(/^#\/?/, "").split("/");
  state.page = pages.some(([name]) => name === page) ? page : "";
  state.peerId = peerId === null || peerId === "" ? null : decoded(peerId);
  state.asked = {};
  state.checked = null;
  state.selected = null;
  state.filter.top = 0;
  askedFor = "";
  document.title = `${pages.find(([name]) => name === state.page)[1]} – hiveswarm`;
  window.scrollTo(0, 0);
  update();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a link that somebody broke
  }
}

const set = (name) => (value) => {
  state[name] = value;
  update();
};

function setFilter(changes) {
  Object.assign(state.filter, changes);
  update();
  if (changes.top === 0) document.querySelector("#peer-rows")?.scrollTo(0, 0);
}

function setQuery(changes) {
  Object.assign(state.query, changes);
  clearTimeout(searching);
  searching = setTimeout(() => askForEvents({ anew: true }), SEARCH_MS);
  update();
}

function choose(modelId) {
  state.modelId = modelId || null;
  state.asked = {};
  state.selected = null;
  if (state.page === "events") askForEvents({ anew: true });
  update();
}

// --- what is shown ---

const update = onceAFrame(draw);

function draw() {
  askForPage();
  render(shell(), app);
  const model = chosenModel();
  if (state.asked.history && !(state.asked.history instanceof Error)) drawCharts(state.asked.history);
  const canvas = document.querySelector("#topology");
  if (canvas && model)
    drawTopology(canvas, { live, model, topology: state.asked.topology, mode: state.mode, selected: state.selected });
  if (live.overview && !performance.getEntriesByName("first-view").length) performance.mark("first-view"); // to be measured
}

function freshness() {
  const { state: now, since } = live.freshness;
  if (now === "connecting") return html`<span class="pill"><span aria-hidden="true">◌</span>connecting</span>`;
  if (now === "live") return html`<span class="pill good"><span aria-hidden="true">●</span>live</span>`;
  const words = now === "reconnecting" ? "reconnecting, last heard at" : "stale since";
  return html`<span class="pill bad"><span aria-hidden="true">✕</span>${words} ${since.toLocaleTimeString()}</span>`;
}

function shell() {
  const { overview } = live;
  const models = overview?.models ?? [];
  const model = chosenModel();
  const ofAll = (state.page === "peers" && !state.peerId) || state.page === "events";
  return html`
    <header class="topbar">
      <a class="brand" href="#/" aria-label="hiveswarm"
        ><img src="assets/shared/icon.svg" alt="" /><span class="brand-name">hiveswarm</span></a
      >
      <nav aria-label="Pages">
        ${pages.map(([name, title]) => html`<a href=${`#/${name}`} aria-current=${state.page === name ? "page" : "false"}>${title}</a>`)}
      </nav>
      <span class="spacer"></span>
      <span class="fresh" role="status">${freshness()}</span>
      <label class="hidden" for="model">Model</label>
      ${
        models.length > 1
          ? html`<select id="model" @change=${(event) => choose(event.target.value)}>
              ${ofAll ? html`<option value="" ?selected=${!state.modelId}>all models</option>` : nothing}
              ${models.map((each) => html`<option value=${each.model_id} ?selected=${ofAll ? each.model_id === state.modelId : each === model}>${each.name}</option>`)}
            </select>`
          : nothing
      }
      ${themeButton(update)}
    </header>
    <main class=${state.page === "peers" && !state.peerId ? "full" : ""}>
      ${overview ? html`${warning(overview)} ${page(model)}` : html`<p class="loading soft">${live.connected ? "Asking the swarm…" : "Connecting to the dashboard…"}</p>`}
    </main>
    ${overview ? html`<footer class="tiny soft">network <bdi>${overview.network}</bdi>, read ${age(live.ageS(overview.read_at_s))}; version ${overview.version}; <a href="docs">API</a></footer>` : nothing}
  `;
}

function warning(overview) {
  if (!overview.problem) return nothing;
  return html`<p class="notice warn" role="alert">
    ${icon("auto")} What is shown is from ${age(live.ageS(overview.read_at_s))}: <bdi>${overview.problem}</bdi>
  </p>`;
}

function page(model) {
  const { asked } = state;
  const checks = { check, checking: state.checking, checked: state.checked, update };
  switch (state.page) {
    case "peers":
      if (state.peerId) return peerPage({ live, peer: asked.peer, ...checks });
      return peersPage({
        live,
        model: state.modelId ? model : null,
        filter: state.filter,
        setFilter,
        height: window.innerHeight,
      });
    case "topology":
      return topologyPage({
        live,
        model,
        topology: asked.topology,
        mode: state.mode,
        setMode: set("mode"),
        selected: state.selected,
        select: set("selected"),
        open: (peerId) => (location.hash = `#/peers/${encodeURIComponent(peerId)}`),
      });
    case "events":
      return eventsPage({
        live,
        query: state.query,
        setQuery,
        found: asked.events,
        more: () => askForEvents({ before: asked.events.events.at(-1).id }),
      });
    case "join":
      return joinPage({ join: asked.join, ...checks });
    default:
      return overviewPage({ live, model, history: asked.history, hours: state.hours, setHours: set("hours"), choose });
  }
}

window.addEventListener("hashchange", goTo);
window.addEventListener("resize", update);
document.documentElement.addEventListener("themechange", () => {
  forgetCharts();
  update();
});
setInterval(update, 1000); // everything says how old it is
app.replaceChildren();
goTo();
