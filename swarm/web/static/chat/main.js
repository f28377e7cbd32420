// The chat page: what it knows (`state`), what happens (functions), what is shown (`page`). One answer at a time.

import { html, nothing, render } from "../vendor/lit-html/lit-html.js";
import { repeat } from "../vendor/lit-html/directives/repeat.js";
import { copy, icon, media, number, rate, seconds, shortId, themeButton } from "../shared/ui.js";
import { show } from "./markdown.js";
import { addStep, drawColumns, newTrace, pulse, routeView } from "./route.js";
import * as store from "./store.js";
import { answer, models, Trouble } from "./stream.js";

const KEEP_EVERY_MS = 1000;
const app = document.querySelector("#app");
const announcer = document.querySelector("#announcer");

const state = {
  models: null,
  trouble: null, // why there are no models
  key: store.apiKey(),
  settings: store.settings(),
  chats: store.conversations(),
  chat: null,
  running: null, // {message, trace, abort, begunMs, firstMs, lastMs, tokens}
  editing: null, // index of the message that is being changed
  copied: null,
  full: false, // the browser keeps nothing more
  following: true, // the newest words stay in sight
};

// --- what happens ---

function begin(chat) {
  stop();
  state.chat = chat;
  state.editing = null;
  state.following = true;
  update();
  document.querySelector("#draft")?.focus();
}

function newChat() {
  document.querySelector("#side")?.hidePopover?.();
  const last = state.chat ?? state.chats[0];
  begin(store.newConversation(chosenModel(last?.model), last?.system ?? ""));
}

function openChat(chat) {
  document.querySelector("#side")?.hidePopover?.();
  begin(chat);
}

function removeChat(chat) {
  if (!confirm(`Delete “${chat.title}”? It cannot be brought back.`)) return;
  store.forget(chat);
  state.chats = state.chats.filter((other) => other !== chat);
  if (state.chat === chat) newChat();
  update();
}

function chosenModel(name) {
  const names = (state.models ?? []).map((model) => model.id);
  return names.includes(name) ? name : (names[0] ?? name ?? "");
}

function keepChat(chat) {
  chat.at = Date.now();
  state.full = !store.keep(chat);
  if (!state.chats.includes(chat)) state.chats.unshift(chat);
}

async function loadModels() {
  try {
    state.models = await models(state.key);
    state.trouble = null;
    if (state.chat) state.chat.model = chosenModel(state.chat.model);
  } catch (trouble) {
    state.trouble = trouble;
  }
  update();
}

function send(text) {
  if (!text.trim() || state.running || !state.models?.length) return false;
  const { chat } = state;
  chat.messages.push({ role: "user", content: text });
  if (!chat.title) chat.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
  run();
  return true;
}

/** Say it again from here: the message at `at` has new words, or none and its answer is asked for once more. */
function goOnFrom(at, text) {
  const { messages } = state.chat;
  stop();
  state.editing = null;
  if (text !== undefined) messages[at] = { role: "user", content: text };
  messages.splice(at + 1);
  run();
}

function retry(at) {
  goOnFrom(at - 1);
}

function stop() {
  state.running?.abort.abort();
}

async function run() {
  const { chat } = state;
  const message = { role: "assistant", content: "" };
  const running = {
    message,
    trace: newTrace(),
    abort: new AbortController(),
    begunMs: performance.now(),
    firstMs: null,
    lastMs: null,
    tokens: 0,
  };
  state.running = running;
  const body = request(chat);
  chat.messages.push(message);
  state.following = true;
  keepChat(chat);
  update();
  let keptMs = running.begunMs;
  const said = new Announcer();
  try {
    for await (const chunk of answer(body, state.key, running.abort.signal)) {
      take(running, chunk, said);
      update();
      if (performance.now() - keptMs > KEEP_EVERY_MS) {
        keptMs = performance.now();
        keepChat(chat);
      }
    }
    said.end();
  } catch (error) {
    if (error.name === "AbortError") {
      message.stopped = true;
      announce("Stopped.");
    } else if (error instanceof Trouble) {
      message.error = { kind: error.kind, text: error.message, retryAfterS: error.retryAfterS };
      announce(error.message);
    } else throw error;
  } finally {
    message.stats = stats(running);
    message.trace = running.trace;
    if (state.running === running) state.running = null;
    keepChat(chat);
    update();
  }
}

function request(chat) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const { role, content } of chat.messages) {
    const last = messages.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`; // many chat templates want the roles in turn
    else if (content) messages.push({ role, content }); // an answer that broke off before its first word is none
  }
  const settings = Object.fromEntries(Object.entries(state.settings).filter(([, value]) => value !== null));
  return {
    model: chat.model,
    messages,
    ...settings,
    stream: true,
    stream_options: { include_usage: true },
    swarm: { route: true },
  };
}

function take(running, chunk, said) {
  const { message, trace } = running;
  const choice = chunk.choices[0];
  if (choice?.delta.content) {
    running.firstMs ??= performance.now();
    message.content += choice.delta.content;
    said.add(choice.delta.content);
  }
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  for (const step of chunk.swarm?.steps ?? []) {
    running.tokens += 1;
    running.firstStepMs ??= performance.now();
    running.lastMs = performance.now();
    addStep(trace, step);
  }
  if (chunk.swarm) requestAnimationFrame(lightUp);
  if (chunk.usage) running.usage = chunk.usage;
}

function lightUp() {
  for (const list of ["#route .dot", ".strip .dot"]) pulse(document.querySelectorAll(list));
}

function stats(running) {
  const { tokens, firstStepMs, lastMs, begunMs, usage } = running;
  return {
    tokens,
    firstS: running.firstMs === null ? null : (running.firstMs - begunMs) / 1000,
    tokensPerS: tokens > 1 && lastMs > firstStepMs ? ((tokens - 1) * 1000) / (lastMs - firstStepMs) : null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details.cached_tokens ?? 0,
  };
}

/** Reads an answer out sentence by sentence: single words would be spoken over one another. */
class Announcer {
  #waiting = "";

  add(text) {
    this.#waiting += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.#waiting.lastIndexOf(mark)));
    if (end < 0) return;
    announce(this.#waiting.slice(0, end + 1));
    this.#waiting = this.#waiting.slice(end + 1);
  }

  end() {
    if (this.#waiting) announce(this.#waiting);
  }
}

function announce(text) {
  const line = document.createElement("p");
  line.textContent = text;
  announcer.append(line);
  while (announcer.childElementCount > 20) announcer.firstElementChild.remove();
}

// --- keys ---

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) {
    if (state.editing !== null) {
      state.editing = null;
      update();
      document.querySelector("#draft").focus();
    } else stop();
  }
});

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
  draw(); // now: the next key belongs to it
  const area = document.querySelector("#edit");
  grow(area);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

// --- what is shown ---

let due = false;
function update() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    draw();
  });
}

function draw() {
  render(page(), app);
  const list = document.querySelector("#messages");
  state.chat.messages.forEach((message, at) => {
    const body = list.querySelector(`[data-body="${at}"]`);
    if (body && (body.shownText !== message.content || body.shownOf !== message)) {
      if (body.shownOf !== message) {
        body.replaceChildren();
        body.shownBlocks = [];
      }
      body.shownOf = message;
      body.shownText = message.content;
      show(body, message.content);
    }
  });
  const trace = shownTrace();
  const canvas = document.querySelector("#columns");
  if (canvas && trace) drawColumns(canvas, trace);
  const scroller = document.querySelector("#scroller");
  if (state.following) scroller.scrollTop = scroller.scrollHeight;
}

function shownTrace() {
  if (state.running) return state.running.trace;
  return state.chat.messages.findLast((message) => message.trace)?.trace ?? null;
}

function page() {
  return html`
    <header class="topbar">
      <button class="icon quiet narrow-only" popovertarget="side" aria-label="Conversations">${icon("menu")}</button>
      <a class="brand" href="./" aria-label="hiveswarm"><img src="assets/shared/icon.svg" alt="" /><span class="brand-name">hiveswarm</span></a>
      <span class="spacer"></span>
      ${modelChoice()}
      <button class="icon quiet medium-only" popovertarget="route-panel" aria-label="Route of the tokens">${icon("route")}</button>
      <button class="icon quiet" @click=${openSettings} aria-label="Settings" title="Settings">${icon("settings")}</button>
      ${themeButton(update)}
    </header>
    <div class="columns">
      ${side()}
      <main>
        <div id="scroller" @scroll=${scrolled}>
          <div id="messages" role="log" aria-label="Conversation" aria-live="off">
            ${state.chat.title ? html`<h1 class="hidden">${state.chat.title}</h1>` : nothing} ${state.trouble ? troubleView() : nothing}
            ${state.chat.messages.length ? repeat(state.chat.messages, (_, at) => at, messageView) : welcome()}
          </div>
        </div>
        ${state.following
          ? nothing
          : html`<button class="latest" @click=${follow}>Latest words ↓</button>`}
        ${composer()}
      </main>
      <aside id="route-panel" popover aria-labelledby="route-title">
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
    update();
  };
  return html`<label class="hidden" for="model">Model</label>
    <select id="model" @change=${choose} ?disabled=${!names.length}>
      ${names.length
        ? names.map((model) => html`<option .value=${model.id} ?selected=${model.id === state.chat.model}>${model.id}</option>`)
        : html`<option>${state.trouble ? "no models" : "asking…"}</option>`}
    </select>`;
}

function side() {
  return html`<nav id="side" popover aria-label="Conversations">
    <button class="new" @click=${newChat} title="Ctrl+K">${icon("plus")} New chat</button>
    <ul>
      ${repeat(
        state.chats,
        (chat) => chat.id,
        (chat) => html`<li class=${chat === state.chat ? "current" : ""}>
          <button class="quiet open" @click=${() => openChat(chat)} aria-current=${chat === state.chat ? "true" : "false"}>
            ${chat.title}
          </button>
          <button class="icon quiet" @click=${() => removeChat(chat)} aria-label=${`Delete “${chat.title}”`}>${icon("trash")}</button>
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
      <kbd>Enter</kbd> sends, <kbd>Shift</kbd> <kbd>Enter</kbd> begins a line, <kbd>Esc</kbd> stops, <kbd>↑</kbd> changes your
      last message, <kbd>Ctrl</kbd> <kbd>K</kbd> starts anew
    </p>
  </div>`;
}

function troubleView() {
  const needsKey = state.trouble.kind === "key";
  return html`<div class="notice bad" role="alert">
    <p>${state.trouble.message}</p>
    <p>
      ${needsKey
        ? html`<button @click=${openSettings}>Enter the API key</button>`
        : html`<button @click=${loadModels}>${icon("retry")} Try again</button>`}
    </p>
  </div>`;
}

function messageView(message, at) {
  if (state.editing === at) return editView(message, at);
  const live = state.running?.message === message;
  const mine = message.role === "user";
  return html`<article class="message ${mine ? "mine" : "theirs"}" aria-label=${mine ? "You" : "The model"}>
    ${mine
      ? html`<div class="text plain">${message.content}</div>`
      : html`<div class="text" data-body=${at}></div>
          ${live && !message.content ? waiting() : nothing} ${message.stopped ? html`<p class="small soft">Stopped.</p>` : nothing}
          ${message.finish === "length" ? html`<p class="small soft">Ended at the limit of tokens.</p>` : nothing}
          ${message.error ? errorView(message, at) : nothing}`}
    <footer>
      ${mine ? nothing : statsView(live ? stats(state.running) : message.stats, live)}
      <span class="spacer"></span>
      ${live ? nothing : actions(message, at, mine)}
    </footer>
  </article>`;
}

function waiting() {
  return html`<p class="small soft waiting"><span class="blink" aria-hidden="true"></span>The prompt is on its way through the swarm…</p>`;
}

function actions(message, at, mine) {
  const copyIt = async () => {
    state.copied = (await copy(message.content)) ? message : null;
    update();
    setTimeout(() => {
      state.copied = null;
      update();
    }, 1500);
  };
  const done = state.copied === message;
  const what = mine ? "message" : "answer";
  return html`
    ${message.content
      ? html`<button class="icon quiet" @click=${copyIt} aria-label=${done ? "Copied" : `Copy this ${what}`} title="Copy">
          ${icon(done ? "check" : "copy")}
        </button>`
      : nothing}
    ${mine
      ? html`<button class="icon quiet" @click=${() => edit(at)} aria-label="Edit this message" title="Edit">${icon("edit")}</button>`
      : html`<button class="icon quiet" @click=${() => retry(at)} aria-label="Answer again" title="Answer again" ?disabled=${!!state.running}>
          ${icon("retry")}
        </button>`}
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
  const { kind, text, retryAfterS } = message.error;
  return html`<div class="notice bad" role="alert">
    <p>${text}</p>
    ${retryAfterS ? html`<p class="small">It asks to wait ${seconds(retryAfterS)} before the next try.</p>` : nothing}
    <p>
      ${kind === "key"
        ? html`<button @click=${openSettings}>Enter the API key</button>`
        : html`<button @click=${() => retry(at)} ?disabled=${!!state.running}>${icon("retry")} Try again</button>`}
    </p>
  </div>`;
}

function editView(message, at) {
  const submit = (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value;
    if (text.trim()) goOnFrom(at, text);
  };
  const cancel = () => {
    state.editing = null;
    update();
  };
  return html`<form class="message mine editing" @submit=${submit}>
    <label for="edit" class="hidden">Your message</label>
    <textarea id="edit" name="text" .value=${message.content} @keydown=${(event) => editKey(event, at)} @input=${(event) => grow(event.target)}></textarea>
    <p class="tiny soft">What came after it is replaced.</p>
    <footer><span class="spacer"></span><button type="button" @click=${cancel}>Cancel</button><button class="primary">Send the change</button></footer>
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
    ${strip()}
    <div class="box">
      <label for="draft" class="hidden">Your message</label>
      <textarea id="draft" name="draft" rows="1" placeholder="Write a message" @keydown=${draftKey} @input=${(event) => grow(event.target)}></textarea>
      <button class="primary icon" aria-label=${state.running ? "Stop" : "Send"} title=${state.running ? "Stop (Esc)" : "Send (Enter)"} ?disabled=${!state.running && !state.models?.length}>
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
    update();
  }
}

function follow() {
  state.following = true;
  update();
}

// --- settings ---

const fields = [
  ["temperature", "Temperature", "0 always takes the likeliest token", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top-p", "of the likeliest tokens that have this share", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top-k", "of so many of the likeliest tokens", { min: 0, max: 100000, step: 1 }],
  ["min_p", "Min-p", "at least this share of the likeliest one's chance", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "above 1 avoids what was said", { min: 0.01, max: 2, step: 0.01 }],
  ["max_tokens", "Most tokens", "of one answer", { min: 1, max: 1000000, step: 1 }],
  ["seed", "Seed", "the same one gives the same answer", { min: 0, step: 1 }],
];

function openSettings() {
  const dialog = document.querySelector("#settings");
  const form = dialog.querySelector("form");
  form.elements.system.value = state.chat.system;
  form.elements.key.value = state.key;
  form.elements.remember.checked = store.keyIsRemembered();
  for (const [name] of fields) form.elements[name].value = state.settings[name] ?? "";
  dialog.showModal();
}

function saveSettings(event) {
  const form = event.target;
  state.chat.system = form.elements.system.value;
  for (const [name] of fields) {
    const { value } = form.elements[name];
    state.settings[name] = value === "" ? null : Number(value);
  }
  store.keepSettings(state.settings);
  state.key = form.elements.key.value.trim();
  store.keepApiKey(state.key, form.elements.remember.checked);
  if (state.chat.messages.length) keepChat(state.chat);
  loadModels();
}

function settingsDialog() {
  const close = () => document.querySelector("#settings").close();
  const clear = () => {
    const { elements } = document.querySelector("#settings form");
    for (const [name] of fields) elements[name].value = "";
  };
  return html`<dialog id="settings" aria-labelledby="settings-title">
    <form method="dialog" @submit=${saveSettings}>
      <div class="dialog-head">
        <h2 id="settings-title">Settings</h2>
        <button type="button" class="icon quiet" @click=${close} aria-label="Close without saving">${icon("close")}</button>
      </div>
      <div class="field wide">
        <label for="system">System prompt of this conversation</label>
        <textarea id="system" name="system" rows="3" placeholder="How the model should answer"></textarea>
      </div>
      <fieldset>
        <legend>Sampling <span class="soft">– empty: as the model's makers chose</span></legend>
        <div class="grid">
          ${fields.map(
            ([name, label, hint, bounds]) => html`<div class="field">
              <label for=${name}>${label}</label>
              <input id=${name} name=${name} type="number" inputmode="decimal" placeholder="default" min=${bounds.min}
                max=${bounds.max ?? ""} step=${bounds.step} aria-describedby=${`${name}-hint`} />
              <span class="tiny soft" id=${`${name}-hint`}>${hint}</span>
            </div>`,
          )}
        </div>
      </fieldset>
      <div class="field wide">
        <label for="key">API key</label>
        <input id="key" name="key" type="password" autocomplete="off" placeholder="only if this gateway needs one" />
        <label class="check"><input type="checkbox" name="remember" /> Keep it in this browser (else until this tab is closed)</label>
      </div>
      <footer>
        <button type="button" class="quiet" @click=${clear}>All to default</button>
        <span class="spacer"></span>
        <button type="button" @click=${close}>Cancel</button>
        <button class="primary">Save</button>
      </footer>
    </form>
  </dialog>`;
}

newChat();
loadModels();
if (media("(min-width: 701px)")) requestAnimationFrame(() => requestAnimationFrame(() => document.querySelector("#draft").focus()));
document.documentElement.addEventListener("themechange", update);
