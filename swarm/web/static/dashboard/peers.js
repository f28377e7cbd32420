// All peers in one table: sorted, filtered, and only the rows in sight are in the page, be there ten or ten thousand.

import { html } from "../vendor/lit-html/lit-html.js";
import { repeat } from "../vendor/lit-html/directives/repeat.js";
import { number, seconds } from "../shared/ui.js";
import { age, empty, peerLink, spansText, statePill, states } from "./parts.js";

const ROW_PX = 48;
const AROUND = 8; // rows above and below what is in sight

const columns = [
  { key: "name", title: "Peer", value: (row) => (row.name || "￿") + row.peer_id, cell: peerLink, wide: true },
  {
    key: "state",
    title: "State",
    value: (row) => Object.keys(states).indexOf(row.state),
    cell: (row) => statePill(row.state),
  },
  {
    key: "blocks",
    title: "Blocks",
    hint: "From the first one to the one behind the last",
    value: (row) => row.spans[0]?.[0] ?? 1e9,
    cell: (row) => html`<span class="num">${spansText(row.spans)}</span>`,
  },
  {
    key: "precision",
    title: "Precision",
    value: (row) => row.quantization + row.dtype,
    cell: (row) => html`<span class="small">${row.quantization === "none" ? row.dtype : row.quantization}</span>`,
    hide: "narrow",
  },
  {
    key: "speed",
    title: "Per block",
    value: (row) => row.decode_s_per_block,
    cell: (row) => seconds(row.decode_s_per_block),
    num: true,
  },
  {
    key: "queue",
    title: "Queue",
    value: (row) => row.queue_s,
    cell: (row) => seconds(row.queue_s),
    num: true,
    hide: "narrow",
  },
  {
    key: "sessions",
    title: "Sessions",
    value: (row) => row.sessions,
    cell: (row) => number(row.sessions),
    num: true,
    hide: "narrow",
  },
  {
    key: "free",
    title: "Free KV",
    value: (row) => row.free_tokens,
    cell: (row) => number(row.free_tokens),
    num: true,
    hide: "narrow",
  },
  {
    key: "rtt",
    title: "Round trip",
    value: (row) => row.rtt_s ?? 1e9,
    cell: (row) => seconds(row.rtt_s),
    num: true,
    hide: "narrow",
  },
  {
    key: "heard",
    title: "Answered",
    value: (row) => -(row.status_at_s ?? 0),
    cell: (row, live) => age(live.ageS(row.status_at_s)),
    num: true,
    hide: "medium",
  },
];

export const noFilter = { words: "", state: "", sort: "blocks", down: false, top: 0 };

function filtered(live, model, filter) {
  const words = filter.words.toLowerCase();
  const { value } = columns.find(({ key }) => key === filter.sort);
  const found = [];
  for (const row of live.peers.values()) {
    if (model && row.model_id !== model.model_id) continue;
    if (filter.state && row.state !== filter.state) continue;
    if (words && !row.peer_id.toLowerCase().includes(words) && !row.name.toLowerCase().includes(words)) continue;
    found.push([value(row), row]);
  }
  const sign = filter.down ? -1 : 1;
  found.sort(([one, first], [other, second]) => sign * compare(one, other) || compare(first.peer_id, second.peer_id));
  return found.map(([, row]) => row);
}

const compare = (one, other) => (one < other ? -1 : one > other ? 1 : 0);

export function peersPage({ live, model, filter, setFilter, height }) {
  const rows = filtered(live, model, filter);
  const first = Math.max(0, Math.floor(filter.top / ROW_PX) - AROUND);
  const shown = rows.slice(first, first + Math.ceil(height / ROW_PX) + 2 * AROUND);
  const sort = (key) => setFilter({ sort: key, down: filter.sort === key && !filter.down });
  const scrolled = (event) => {
    const top = event.target.scrollTop;
    if (Math.abs(top - filter.top) >= ROW_PX) setFilter({ top });
  };
  return html`
    <h1 class="hidden">Peers</h1>
    <div class="filters" role="search">
      <label class="hidden" for="peer-words">Name or id</label>
      <input
        id="peer-words"
        type="search"
        placeholder="Name or id"
        .value=${filter.words}
        @input=${(event) => setFilter({ words: event.target.value, top: 0 })}
      />
      <label class="hidden" for="peer-state">State</label>
      <select id="peer-state" @change=${(event) => setFilter({ state: event.target.value, top: 0 })}>
        <option value="">every state</option>
        ${Object.entries(states).map(([key, [name]]) => html`<option value=${key} ?selected=${key === filter.state}>${name}</option>`)}
      </select>
      <span class="small soft num" role="status">${number(rows.length)} ${rows.length === 1 ? "peer" : "peers"}</span>
    </div>
    ${
      rows.length === 0
        ? live.peers.size
          ? empty("None of the peers is like this", "Change the words or the state above.")
          : empty("No peers", html`Nobody serves here yet: <a href="#/join">join</a>.`)
        : html`<div class="table card" role="table" aria-label="Peers" aria-rowcount=${rows.length + 1}>
            <div class="row header" role="row" aria-rowindex="1">
              ${columns.map(
                ({ key, title, hint, num, hide, wide }) =>
                  html`<div
                    role="columnheader"
                    class="${num ? "num right" : ""} ${hide ?? ""} ${wide ? "wide" : ""}"
                    aria-sort=${filter.sort === key ? (filter.down ? "descending" : "ascending") : "none"}
                  >
                    <button class="quiet" title=${hint ?? ""} @click=${() => sort(key)}>
                      ${title}<span aria-hidden="true">${filter.sort === key ? (filter.down ? " ↓" : " ↑") : ""}</span>
                    </button>
                  </div>`,
              )}
            </div>
            <div class="body" id="peer-rows" role="rowgroup" tabindex="-1" @scroll=${scrolled}>
              <div .style=${`height:${rows.length * ROW_PX}px;padding-top:${first * ROW_PX}px`}>
                ${repeat(
                  shown,
                  (row) => row.peer_id,
                  (row, at) =>
                    html`<div
                      class="row ${row.gone_at_s === null || row.gone_at_s === undefined ? "" : "gone"}"
                      role="row"
                      aria-rowindex=${first + at + 2}
                    >
                      ${columns.map(({ cell, num, hide, wide }) => html`<div role="cell" class="${num ? "num right" : ""} ${hide ?? ""} ${wide ? "wide" : ""}">${cell(row, live)}</div>`)}
                    </div>`,
                )}
              </div>
            </div>
          </div>`
    }
  `;
}
