// The conversation that is open, and what happens in it. Knows no page: whoever shows it is told of changes.

import { announce, Announcer } from "../shared/announce.js";
import { addStep, newTrace } from "./route.js";
import * as store from "./store.js";
import { answer, models, Trouble, waitedFor } from "./stream.js";

const KEEP_EVERY_MS = 1000;
const RECONNECT_MS = 2000;
const SILENT_MS = 4000; // then it is asked why nothing comes
let tell = () => {};

export const state = {
  models: null,
  trouble: null, // why there are no models
  reconnecting: false, // the gateway was there, or should be, and is asked for until it is back
  key: store.apiKey(),
  settings: store.settings(),
  chats: store.conversations(),
  chat: null,
  running: null, // {message, trace, abort, begunMs, firstMs, lastMs, tokens, waitsFor}
  editing: null, // index of the message that is being changed
  copied: null,
  full: false, // the browser keeps nothing more
  following: true, // the newest words stay in sight
};

/** `listener` is told of every change; `{now: true}`: it must be seen before the next key. */
export function whenChanged(listener) {
  tell = listener;
}

export const changed = (how = {}) => tell(how);

/** Show this one; an answer that is under way elsewhere ends. */
export function begin(chat) {
  stop();
  state.chat = chat;
  state.editing = null;
  state.following = true;
  changed();
}

export function newChat() {
  const last = state.chat ?? state.chats[0];
  begin(store.newConversation(chosenModel(last?.model), last?.system ?? ""));
}

/** Another system prompt for this conversation, and settings for all; with another key there may be other models. */
export function change({ system, settings, key, remember }) {
  state.chat.system = system;
  state.settings = settings;
  store.keepSettings(settings);
  state.key = key;
  store.keepApiKey(key, remember);
  if (state.chat.messages.length) keepChat(state.chat);
  loadModels();
}

/** Of the answer under way, or of the last one that has any. */
export function shownTrace() {
  if (state.running) return state.running.trace;
  return state.chat.messages.findLast((message) => message.trace)?.trace ?? null;
}

export function removeChat(chat) {
  store.forget(chat);
  state.chats = state.chats.filter((other) => other !== chat);
  if (state.chat === chat) newChat();
  changed();
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

export async function loadModels() {
  try {
    state.models = await models(state.key);
    state.trouble = null;
    if (state.chat) state.chat.model = chosenModel(state.chat.model);
    if (state.reconnecting) announce("The gateway is back.");
    state.reconnecting = false;
  } catch (trouble) {
    if (isAway(trouble)) reconnect();
    else state.reconnecting = false;
    if (!state.models || !state.reconnecting) state.trouble = trouble;
  }
  changed();
}

const isAway = ({ kind }) => kind === "lost" || kind === "down";

/** Ask until the gateway is back. An answer that broke off is not asked for again: only its reader knows whether. */
async function reconnect() {
  if (state.reconnecting) return;
  state.reconnecting = true;
  while (state.reconnecting) {
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
    await loadModels();
  }
}

export function send(text) {
  if (!text.trim() || state.running || !state.models?.length) return false;
  const { chat } = state;
  chat.messages.push({ role: "user", content: text });
  if (!chat.title) chat.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
  run();
  return true;
}

/** Say it again from here: the message at `at` has new words, or none and its answer is asked for once more. */
export function goOnFrom(at, text) {
  const { messages } = state.chat;
  stop();
  state.editing = null;
  if (text !== undefined) messages[at] = { role: "user", content: text };
  messages.splice(at + 1);
  run();
}

export function retry(at) {
  goOnFrom(at - 1);
}

export function stop() {
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
    waitsFor: null, // why nothing comes, where the gateway knows
  };
  state.running = running;
  const body = request(chat);
  chat.messages.push(message);
  state.following = true;
  keepChat(chat);
  changed();
  let keptMs = running.begunMs;
  const said = new Announcer();
  const looks = setInterval(() => lookWhy(running, chat.model), SILENT_MS / 2);
  try {
    for await (const chunk of answer(body, state.key, running.abort.signal)) {
      take(running, chunk, said);
      changed();
      if (performance.now() - keptMs > KEEP_EVERY_MS) {
        keptMs = performance.now();
        if (state.chats.includes(chat)) keepChat(chat); // else it was deleted meanwhile
      }
    }
    said.end();
  } catch (error) {
    if (error.name === "AbortError") {
      message.stopped = true;
      announce("Stopped.");
    } else if (error instanceof Trouble) {
      const { kind, message: text, retryAfterS, detail } = error;
      message.error = { kind, text, retryAfterS, detail };
      announce(error.message);
      if (isAway(error)) loadModels(); // is it the gateway, or only what it asked?
    } else throw error;
  } finally {
    clearInterval(looks);
    message.stats = stats(running);
    message.trace = running.trace;
    if (state.running === running) state.running = null;
    if (state.chats.includes(chat)) keepChat(chat);
    changed();
  }
}

async function lookWhy(running, model) {
  const heardMs = () => running.lastMs ?? running.begunMs;
  const isSilent = () => performance.now() - heardMs() >= SILENT_MS;
  const why = isSilent() ? await waitedFor(model) : null;
  const waitsFor = isSilent() ? why : null; // something may have come meanwhile
  if (waitsFor && !running.waitsFor) announce(`Waiting: ${waitsFor.text}`);
  running.waitsFor = waitsFor;
  changed();
}

function request(chat) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const { role, content } of chat.messages) {
    const last = messages.at(-1);
    if (last?.role === role)
      last.content += `\n\n${content}`; // many chat templates want the roles in turn
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
    running.waitsFor = null;
    addStep(trace, step);
  }
  if (chunk.usage) running.usage = chunk.usage;
}

export function stats(running) {
  const { tokens, firstStepMs, lastMs, begunMs, usage } = running;
  return {
    tokens,
    firstS: running.firstMs === null ? null : (running.firstMs - begunMs) / 1000,
    tokensPerS: tokens > 1 && lastMs > firstStepMs ? ((tokens - 1) * 1000) / (lastMs - firstStepMs) : null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details.cached_tokens ?? 0,
  };
}
