// The first page: how the chosen model is, now and over the last hours.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { bytes, number, rate } from "../shared/ui.js";
import { charts } from "./charts.js";
import { bestRoute, empty, eventList, modelHealth, spansText, states, strip } from "./parts.js";

function tile(label, value, unit, note) {
  return html`<div class="card tile">
    <dt class="small soft">${label}</dt>
    <dd><span class="value num">${value}</span> <span class="soft small">${unit}</span></dd>
    ${note ? html`<dd class="tiny soft note">${note}</dd>` : nothing}
  </div>`;
}

function stateList(counts) {
  const present = Object.entries(states).filter(([state]) => counts[state]);
  return html`<ul class="states small">
    ${present.map(
      ([state, [name, tone, sign]]) =>
        html`<li>
          <span class="pill ${tone}"><span aria-hidden="true">${sign}</span>${name}</span>
          <span class="num">${number(counts[state])}</span>
        </li>`,
    )}
  </ul>`;
}

export function overviewPage({ live, model, history, hours, setHours, choose }) {
  const { overview } = live;
  if (!model) {
    return overview.read_at_s === null
      ? empty("Looking for peers", "The dashboard is reading the network's records. This takes a few seconds.")
      : empty(
          "Nobody serves a model here yet",
          html`Be the first: <a href="#/join">join with a computer of yours</a>.`,
        );
  }
  const [tone, sign, words] = modelHealth(model);
  const { totals } = overview;
  return html`
    <h1 class="hidden">Overview</h1>
    <section class="health notice ${tone}">
      <span class="sign" aria-hidden="true">${sign}</span>
      <p>
        <strong><bdi>${model.name}</bdi></strong> <span>${words}</span>
      </p>
    </section>
    <dl class="tiles">
      ${tile("One conversation", rate(model.stream_tokens_per_s), "tokens/s", model.stream_tokens_per_s === null ? "there is no route now" : "expected on the best route from here")}
      ${tile("All users together", rate(model.total_tokens_per_s), "tokens/s", "at most, by what peers say of their speed")}
      ${tile("Peers online", number(model.states.online), "", stateList({ ...model.states, online: 0 }))}
      ${tile("Sessions", number(model.sessions), "", `${number(model.queued_tokens)} tokens in queues`)}
      ${tile("Memory, whole network", bytes(totals.memory_used_bytes), `of ${bytes(totals.memory_offered_bytes)}`, `${number(totals.answering)} peers answered`)}
    </dl>
    <section class="card">
      <div class="head">
        <h2>Blocks</h2>
        <span class="soft small">${number(model.num_blocks)} blocks, and how many online peers hold each</span>
      </div>
      ${strip(model)}
    </section>
    <section class="card">
      <div class="head">
        <h2>Best route from here</h2>
        <a class="small" href="#/topology">Topology</a>
      </div>
      ${bestRoute(model)}
    </section>
    ${model.adapters.length ? adapterList(model.adapters) : nothing}
    <section class="card">
      <div class="head">
        <h2>History</h2>
        <div class="choice" role="group" aria-label="Time shown">
          ${[1, 6, 24].map((each) => html`<button class="quiet" aria-pressed=${each === hours} @click=${() => setHours(each)}>${each} h</button>`)}
        </div>
      </div>
      ${charts(history)}
    </section>
    <section class="card">
      <div class="head">
        <h2>Latest events</h2>
        <a class="small" href="#/events">All</a>
      </div>
      ${
        live.events.length
          ? eventList(live.events.slice(0, 6), live.nowS)
          : html`<p class="soft">Nothing has happened since the dashboard began to look.</p>`
      }
    </section>
    ${overview.models.length > 1 ? modelList(overview, model, choose) : nothing}
  `;
}

function adapterList(adapters) {
  return html`<section class="card">
    <div class="head">
      <h2>Adapters</h2>
      <span class="small soft">hosted for everybody; <code>--adapter NAME</code> generates with one</span>
    </div>
    <ul class="models adapters">
      ${adapters.map(
        ({ name, digest, hosts, gaps }) =>
          html`<li>
            <span class="pill ${gaps.length ? "bad" : "good"}"
              ><span aria-hidden="true">${gaps.length ? "✕" : "✓"}</span>${gaps.length ? "gaps" : "complete"}</span
            >
            <span class="adapter"
              ><strong><bdi>${name}</bdi></strong><span class="mono soft">@${digest}</span></span
            >
            <span class="small soft num"
              >${number(hosts)} ${hosts === 1 ? "host" : "hosts"}${gaps.length ? html`, none for blocks ${spansText(gaps)}` : nothing}</span
            >
          </li>`,
      )}
    </ul>
  </section>`;
}

function modelList(overview, chosen, choose) {
  return html`<section class="card">
    <div class="head">
      <h2>Models</h2>
      ${overview.models_left_out ? html`<span class="small soft">${overview.models_left_out} more</span>` : nothing}
    </div>
    <ul class="models">
      ${overview.models.map((model) => {
        const [tone, sign, words] = modelHealth(model);
        return html`<li>
          <span class="pill ${tone}"
            ><span aria-hidden="true">${sign}</span
            >${tone === "bad" ? "gaps" : tone === "warn" ? "thin" : "healthy"}</span
          >
          <button
            class="quiet model-name"
            aria-pressed=${model === chosen}
            @click=${() => choose(model.model_id)}
            title=${words}
          >
            <bdi>${model.name}</bdi>
          </button>
          <span class="small soft num"
            >${number(model.states.online)} online, ${rate(model.stream_tokens_per_s)} tokens/s</span
          >
        </li>`;
      })}
    </ul>
  </section>`;
}
