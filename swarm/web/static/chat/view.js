// What the page shows of the conversation, and what its buttons and fields do.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { repeat } from "../vendor/lit-html/directives/repeat.js";
import { copy, icon, number, rate, seconds, shortId, themeButton } from "../shared/ui.js";
import {
  begin,
  changed,
  goOnFrom,
  loadModels,
  newChat,
  removeChat,
  retry,
  send,
  shownTrace,
  state,
  stats,
  stop,
} from "./conversation.js";
import { routeView } from "./route.js";
import { openSettings, settingsDialog } from "./settings.js";

/** Open another conversation, and be ready to write in it. */
function open(chat) {
  document.querySelector("#side")?.hidePopover?.();
  if (chat === null) newChat();
  else begin(chat);
  document.querySelector("#draft")?.focus();
}

export const startAnew = () => open(null);

function remove(chat) {
  if (confirm(`Delete “${chat.title}”? It cannot be brought back.`)) removeChat(chat);
}

export function page() {
  return html`
    <header class="topbar">
      <button class="icon quiet narrow-only" popovertarget="side" aria-label="Conversations">${icon("menu")}</button>
      <a class="brand" href="./" aria-label="hiveswarm"
        ><img src="assets/shared/icon.svg" alt="" /><span class="brand-name">hiveswarm</span></a
      >
      <span class="spacer"></span>
      ${modelChoice()}
      <button class="icon quiet medium-only" popovertarget="route-panel" aria-label="Route of the tokens">
        ${icon("route")}
      </button>
      <button class="icon quiet" @click=${openSettings} aria-label="Settings" title="Settings">
        ${icon("settings")}
      </button>
      ${themeButton(changed)}
    </header>
    <div class="columns">
      ${side()}
      <main>
        <div id="scroller" @scroll=${scrolled}>
          <div id="messages" role="log" aria-label="Conversation" aria-live="off">
            ${state.chat.title ? html`<h1 class="hidden">${state.chat.title}</h1>` : nothing}
            ${state.trouble ? troubleView() : nothing}
            ${state.chat.messages.length ? repeat(state.chat.messages, (_, at) => at, messageView) : welcome()}
          </div>
        </div>
        ${state.following ? nothing : html`<button class="latest" @click=${follow}>Latest words ↓</button>`}
        ${composer()}
      </main>
      <aside id="route-panel" popover aria-labelledby="route-title" @toggle=${() => changed()}>
        <h2 id="route-title">Route</h2>
        <div id="route">${routeView(shownTrace(), { live: state.running !== null })}</div>
      </aside>
    </div>
    ${settingsDialog()}
  `;
}

function modelChoice() {
  const names = state.models ?? [];
  const choose = (event) => {
    state.chat.model = event.target.value;
    changed();
  };
  return html`<label class="hidden" for="model">Model</label>
    <select id="model" @change=${choose} ?disabled=${!names.length}>
      ${
        names.length
          ? names.map(
              (model) =>
                html`<option .value=${model.id} ?selected=${model.id === state.chat.model}>${model.id}</option>`,
            )
          : html`<option>${state.trouble ? "no models" : "asking…"}</option>`
      }
    </select>`;
}

function side() {
  return html`<nav id="side" popover aria-label="Conversations">
    <button class="new" @click=${startAnew} title="Ctrl+K">${icon("plus")} New chat</button>
    <ul>
      ${repeat(
        state.chats,
        (chat) => chat.id,
        (chat) =>
          html`<li class=${chat === state.chat ? "current" : ""}>
            <button
              class="quiet open"
              @click=${() => open(chat)}
              aria-current=${chat === state.chat ? "true" : "false"}
            >
              ${chat.title}
            </button>
            <button class="icon quiet" @click=${() => remove(chat)} aria-label=${`Delete “${chat.title}”`}>
              ${icon("trash")}
            </button>
          </li>`,
      )}
    </ul>
    ${state.chats.length ? nothing : html`<p class="small soft">Conversations stay in this browser and appear here.</p>`}
    <p class="tiny soft">Peers can read what you send. <a href="docs">API</a></p>
  </nav>`;
}

function welcome() {
  if (state.trouble) return nothing;
  return html`<div class="welcome">
    <h1>Ask the swarm</h1>
    <p class="soft">
      Several computers each hold a part of the model. Your words pass through them one token at a time, and the route
      shows where each one is computed.
    </p>
    <p class="small soft keys">
      <kbd>Enter</kbd> sends, <kbd>Shift</kbd> <kbd>Enter</kbd> begins a line, <kbd>Esc</kbd> stops,
      <kbd>↑</kbd> changes your last message, <kbd>Ctrl</kbd> <kbd>K</kbd> starts anew
    </p>
  </div>`;
}

function troubleView() {
  const needsKey = state.trouble.kind === "key";
  return html`<div class="notice bad" role="alert">
    <p>${state.trouble.message}</p>
    <p>
      ${
        needsKey
          ? html`<button @click=${openSettings}>Enter the API key</button>`
          : html`<button @click=${loadModels}>${icon("retry")} Try again</button>`
      }
    </p>
  </div>`;
}

function messageView(message, at) {
  if (state.editing === at) return editView(message, at);
  const live = state.running?.message === message;
  const mine = message.role === "user";
  return html`<article class="message ${mine ? "mine" : "theirs"}" aria-label=${mine ? "You" : "The model"}>
    ${
      mine
        ? html`<div class="text plain">${message.content}</div>`
        : html`<div class="text" data-body=${at}></div>
            ${live && state.running.waitsFor ? waitingFor(state.running.waitsFor) : live && !message.content ? waiting() : nothing}
            ${message.stopped ? html`<p class="small soft">Stopped.</p>` : nothing}
            ${message.finish === "length" ? html`<p class="small soft">Ended at the limit of tokens.</p>` : nothing}
            ${message.error ? errorView(message, at) : nothing}`
    }
    <footer>
      ${mine ? nothing : statsView(live ? stats(state.running) : message.stats, live)}
      <span class="spacer"></span>
      ${live ? nothing : actions(message, at, mine)}
    </footer>
  </article>`;
}

function waiting() {
  return html`<p class="small soft waiting">
    <span class="blink" aria-hidden="true"></span>The prompt is on its way through the swarm…
  </p>`;
}

function waitingFor({ text, detail }) {
  return html`<div class="notice warn small">
    <p><span class="blink" aria-hidden="true"></span>The answer waits for peers, and goes on by itself: ${text}.</p>
    ${detailView(detail)}
  </div>`;
}

function actions(message, at, mine) {
  const copyIt = async () => {
    state.copied = (await copy(message.content)) ? message : null;
    changed();
    setTimeout(() => {
      state.copied = null;
      changed();
    }, 1500);
  };
  const done = state.copied === message;
  const what = mine ? "message" : "answer";
  return html`
    ${
      message.content
        ? html`<button
            class="icon quiet"
            @click=${copyIt}
            aria-label=${done ? "Copied" : `Copy this ${what}`}
            title="Copy"
          >
            ${icon(done ? "check" : "copy")}
          </button>`
        : nothing
    }
    ${
      mine
        ? html`<button class="icon quiet" @click=${() => edit(at)} aria-label="Edit this message" title="Edit">
            ${icon("edit")}
          </button>`
        : html`<button
            class="icon quiet"
            @click=${() => retry(at)}
            aria-label="Answer again"
            title="Answer again"
            ?disabled=${!!state.running}
          >
            ${icon("retry")}
          </button>`
    }
  `;
}

function statsView(stats, live) {
  if (!stats || (!stats.tokens && !live)) return nothing;
  const parts = [];
  if (stats.tokens) parts.push(`${number(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`);
  if (stats.tokensPerS) parts.push(`${rate(stats.tokensPerS)} tokens/s`);
  if (stats.firstS !== null) parts.push(`first after ${seconds(stats.firstS)}`);
  if (stats.cached) parts.push(`${number(stats.cached)} of ${number(stats.prompt)} prompt tokens kept`);
  return html`<span class="tiny soft num stats">${parts.join(" · ")}</span>`;
}

function errorView(message, at) {
  const { kind, text, retryAfterS, detail } = message.error;
  return html`<div class="notice bad" role="alert">
    <p>${text}</p>
    ${detailView(detail)}
    ${retryAfterS ? html`<p class="small">It asks to wait ${seconds(retryAfterS)} before the next try.</p>` : nothing}
    <p>
      ${
        kind === "key"
          ? html`<button @click=${openSettings}>Enter the API key</button>`
          : html`<button @click=${() => retry(at)} ?disabled=${!!state.running}>${icon("retry")} Try again</button>`
      }
    </p>
  </div>`;
}

function detailView(detail) {
  return detail ? html`<details class="small"><summary>Details</summary><p>${detail}</p></details>` : nothing;
}

function editView(message, at) {
  const submit = (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value;
    if (text.trim()) goOnFrom(at, text);
  };
  return html`<form class="message mine editing" @submit=${submit}>
    <label for="edit" class="hidden">Your message</label>
    <textarea
      id="edit"
      name="text"
      .value=${message.content}
      @keydown=${(event) => editKey(event, at)}
      @input=${(event) => grow(event.target)}
    ></textarea>
    <p class="tiny soft">What came after it is replaced.</p>
    <footer>
      <span class="spacer"></span><button type="button" @click=${leaveEditing}>Cancel</button
      ><button class="primary">Send the change</button>
    </footer>
  </form>`;
}

function composer() {
  const submit = (event) => {
    event.preventDefault();
    const area = event.target.elements.draft;
    if (state.running) stop();
    else if (send(area.value)) {
      area.value = "";
      grow(area);
    }
  };
  return html`<form class="composer" @submit=${submit}>
    ${state.full ? html`<p class="notice warn small">This browser has no room left: delete a conversation to keep this one.</p>` : nothing}
    <div role="status">
      ${state.reconnecting ? html`<p class="notice bad small">The gateway cannot be reached: reconnecting…</p>` : nothing}
    </div>
    ${strip()}
    <div class="box">
      <label for="draft" class="hidden">Your message</label>
      <textarea
        id="draft"
        name="draft"
        rows="1"
        placeholder="Write a message"
        @keydown=${draftKey}
        @input=${(event) => grow(event.target)}
      ></textarea>
      <button
        class="primary icon"
        aria-label=${state.running ? "Stop" : "Send"}
        title=${state.running ? "Stop (Esc)" : "Send (Enter)"}
        ?disabled=${!state.running && !state.models?.length}
      >
        ${icon(state.running ? "stop" : "send")}
      </button>
    </div>
  </form>`;
}

/** The route in one line, where there is no place for the panel. */
function strip() {
  const trace = shownTrace();
  if (!trace?.last) return nothing;
  return html`<button type="button" class="strip quiet medium-only" popovertarget="route-panel">
    ${trace.last.hops.map((hop, at) => html`<span class="dot" .style=${`--hop:var(--hop-${(at % 6) + 1})`}></span><span class="mono">${shortId(hop.peer_id).slice(-5)}</span>`)}
    <span class="num">${seconds(trace.last.total_s)}</span>
  </button>`;
}

function scrolled(event) {
  const { scrollTop, scrollHeight, clientHeight } = event.target;
  const following = scrollHeight - scrollTop - clientHeight < 60;
  if (following !== state.following) {
    state.following = following;
    changed();
  }
}

function follow() {
  state.following = true;
  changed();
}

function draftKey(event) {
  const area = event.target;
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (send(area.value)) {
      area.value = "";
      grow(area);
    }
  } else if (event.key === "ArrowUp" && !area.value && !state.running) {
    const at = state.chat.messages.findLastIndex((message) => message.role === "user");
    if (at >= 0) {
      event.preventDefault();
      edit(at);
    }
  }
}

function editKey(event, at) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (event.target.value.trim()) goOnFrom(at, event.target.value);
  }
}

function edit(at) {
  stop();
  state.editing = at;
  changed({ now: true }); // the next key belongs to it
  const area = document.querySelector("#edit");
  grow(area);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

export function leaveEditing() {
  state.editing = null;
  changed();
  document.querySelector("#draft").focus();
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}
