// Conversations, settings and the key, in this browser only. Every conversation lies under a key of its own, so that
// one that grows does not rewrite the others.

const PREFIX = "hiveswarm.chat.";
const SETTINGS = "hiveswarm.settings";
const API_KEY = "hiveswarm.key";

/** Of one request, beyond the messages: what is null is left to the model's own defaults. */
const noSettings = {
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  repetition_penalty: null,
  max_tokens: null,
  seed: null,
};

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // nothing there, or not ours
  }
}

/** Whether it was kept. */
function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or switched off
  }
}

export function newConversation(model, system) {
  return {
    id: crypto.getRandomValues(new Uint32Array(4)).join("-"),
    title: "",
    model,
    system,
    messages: [],
    at: Date.now(),
  };
}

/** All of them, the latest first. */
export function conversations() {
  const found = [];
  for (let at = 0; at < localStorage.length; at += 1) {
    const key = localStorage.key(at);
    if (!key.startsWith(PREFIX)) continue;
    const one = read(localStorage, key);
    if (one && Array.isArray(one.messages)) found.push(one);
  }
  return found.sort((one, other) => other.at - one.at);
}

export function keep(conversation) {
  return write(localStorage, PREFIX + conversation.id, conversation);
}

export function forget(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

export function settings() {
  return { ...noSettings, ...read(localStorage, SETTINGS) };
}

export function keepSettings(value) {
  write(localStorage, SETTINGS, value);
}

/** The API key: of this tab, or of this browser where its owner asked for that. */
export function apiKey() {
  return read(sessionStorage, API_KEY) ?? read(localStorage, API_KEY) ?? "";
}

export function keyIsRemembered() {
  return localStorage.getItem(API_KEY) !== null;
}

export function keepApiKey(key, remember) {
  sessionStorage.removeItem(API_KEY);
  localStorage.removeItem(API_KEY);
  if (key) write(remember ? localStorage : sessionStorage, API_KEY, key);
}
