// The swarm as the stream tells it: one picture, brought up to date message by message, and how fresh it is. Draws
// nothing.

const QUIET_S = 25; // a message comes every 10 s, whatever happens
const RETRY_MS = 3000;
const LATEST_EVENTS = 50;

export class Live {
  /** `changed` is called after every message and whenever the connection comes or goes. */
  constructor(changed) {
    this.overview = null; // of the snapshot, with what came since
    this.peers = new Map();
    this.events = [];
    this.latestEventId = 0;
    this.connected = false;
    this.heardAtMs = null; // performance.now() of the last message, and the time of day
    this.heardAt = null;
    this.#changed = changed;
    this.#open("");
  }

  #changed;
  #source;
  #serverS = 0;

  /** The dashboard's own clock, now. */
  get nowS() {
    return this.heardAtMs === null ? Date.now() / 1000 : this.#serverS + (performance.now() - this.heardAtMs) / 1000;
  }

  ageS(atS) {
    return atS === null || atS === undefined ? null : Math.max(0, this.nowS - atS);
  }

  /** What a reader has to know about how fresh this is: {state: connecting, live, reconnecting, stale; since}. */
  get freshness() {
    if (this.heardAtMs === null) return { state: "connecting" };
    if (!this.connected) return { state: "reconnecting", since: this.heardAt };
    const quiet = performance.now() - this.heardAtMs > QUIET_S * 1000;
    return quiet ? { state: "stale", since: this.heardAt } : { state: "live" };
  }

  #open(lastId) {
    const source = new EventSource(`api/v1/stream${lastId ? `?last_event_id=${encodeURIComponent(lastId)}` : ""}`);
    this.#source = source;
    source.addEventListener("snapshot", (event) => this.#take(event, (data) => this.#snapshot(data)));
    source.addEventListener("delta", (event) => this.#take(event, (data) => this.#delta(data)));
    source.addEventListener("open", () => this.#connection(true));
    source.addEventListener("error", () => {
      this.#connection(false);
      if (source.readyState === EventSource.CLOSED) setTimeout(() => this.#open(this.lastId), RETRY_MS);
      // else the browser tries again itself, and says what it had last
    });
  }

  #connection(connected) {
    if (connected === this.connected) return;
    this.connected = connected;
    this.#changed();
  }

  #take(event, apply) {
    const data = JSON.parse(event.data);
    this.lastId = event.lastEventId;
    this.heardAtMs = performance.now();
    this.heardAt = new Date();
    this.#serverS = data.now_s;
    this.connected = true;
    apply(data);
    this.#changed();
  }

  #snapshot({ peers, events, ...overview }) {
    this.overview = overview;
    this.peers = new Map(peers.map((peer) => [peer.peer_id, peer]));
    this.events = events;
    this.latestEventId = events[0]?.id ?? 0;
  }

  #delta(delta) {
    const { overview } = this;
    overview.read_at_s = delta.read_at_s;
    overview.problem = delta.problem;
    overview.totals = delta.totals;
    for (const patch of delta.peers) {
      const known = this.peers.get(patch.peer_id);
      this.peers.set(patch.peer_id, known ? { ...known, ...patch } : patch);
    }
    for (const id of delta.forgotten) this.peers.delete(id);
    for (const model of delta.models) {
      const at = overview.models.findIndex((known) => known.model_id === model.model_id);
      if (at < 0) overview.models.push(model);
      else overview.models[at] = model;
    }
    if (delta.models_gone.length) {
      overview.models = overview.models.filter((model) => !delta.models_gone.includes(model.model_id));
    }
    if (delta.events.length) {
      this.events = [...delta.events.toReversed(), ...this.events].slice(0, LATEST_EVENTS);
      this.latestEventId = this.events[0].id;
    }
  }
}

/** Thrown for an answer that is none; `message` says in words what is wrong. */
class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(`api/v1/${path}`, options);
  } catch {
    throw new Problem("The dashboard cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response.json();
  let said = {};
  try {
    said = await response.json();
  } catch {
    // something between us and the dashboard answered
  }
  const wait = response.headers.get("retry-after");
  const words = [
    said.error ?? `The dashboard answered ${response.status}.`,
    said.hint,
    wait && `Try again in ${wait} s.`,
  ];
  throw new Problem(words.filter(Boolean).join(" "), response.status);
}
