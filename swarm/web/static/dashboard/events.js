// What happened, the newest first, by kind and words; the dashboard looks them up in its file.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { empty, eventList, kindName, problemNotice } from "./parts.js";

export const kinds = ["joined", "returned", "left", "lost", "moved", "paused", "resumed", "gap_opened", "gap_healed"];
export const noQuery = { words: "", kinds: [] };

export function eventsPath(query, model, before) {
  const parts = new URLSearchParams();
  for (const kind of query.kinds) parts.append("kind", kind);
  if (query.words) parts.set("q", query.words);
  if (model) parts.set("model", model.model_id);
  if (before) parts.set("before", before);
  return `events?${parts}`;
}

export function eventsPage({ live, query, setQuery, found, more }) {
  const toggle = (kind) =>
    setQuery({
      kinds: query.kinds.includes(kind) ? query.kinds.filter((other) => other !== kind) : [...query.kinds, kind],
    });
  return html`
    <h1 class="hidden">Events</h1>
    <div class="filters" role="search">
      <label class="hidden" for="event-words">Words, or a part of a peer's id</label>
      <input
        id="event-words"
        type="search"
        placeholder="Words or id"
        .value=${query.words}
        @input=${(event) => setQuery({ words: event.target.value })}
      />
      <div class="choice" role="group" aria-label="Kinds">
        ${kinds.map((kind) => html`<button class="quiet" aria-pressed=${query.kinds.includes(kind)} @click=${() => toggle(kind)}>${kindName(kind)}</button>`)}
      </div>
    </div>
    ${
      found instanceof Error
        ? problemNotice(found.message)
        : !found
          ? html`<p class="soft loading">Reading…</p>`
          : found.events.length
            ? html`<div class="card">${eventList(found.events, live.nowS)}</div>
                ${found.more ? html`<p class="actions"><button @click=${more}>Older ones</button></p>` : nothing}`
            : empty(
                "Nothing like this",
                query.words || query.kinds.length
                  ? "Change the words or the kinds above."
                  : "Nothing has happened since the dashboard began to look.",
              )
    }
  `;
}
