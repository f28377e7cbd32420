// The dialog of what a conversation is asked with, and of the key.

import { html } from "../vendor/lit-html/lit-html.js";
import { icon } from "../shared/ui.js";
import { change, state } from "./conversation.js";
import { keyIsRemembered } from "./store.js";

const fields = [
  ["temperature", "Temperature", "0 always takes the likeliest token", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top-p", "of the likeliest tokens that have this share", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top-k", "of so many of the likeliest tokens", { min: 0, max: 100000, step: 1 }],
  ["min_p", "Min-p", "at least this share of the likeliest one's chance", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "above 1 avoids what was said", { min: 0.01, max: 2, step: 0.01 }],
  ["max_tokens", "Most tokens", "of one answer", { min: 1, max: 1000000, step: 1 }],
  ["seed", "Seed", "the same one gives the same answer", { min: 0, step: 1 }],
];

export function openSettings() {
  const dialog = document.querySelector("#settings");
  const form = dialog.querySelector("form");
  form.elements.system.value = state.chat.system;
  form.elements.key.value = state.key;
  form.elements.remember.checked = keyIsRemembered();
  for (const [name] of fields) form.elements[name].value = state.settings[name] ?? "";
  dialog.showModal();
}

function saveSettings(event) {
  const { elements } = event.target;
  const settings = {};
  for (const [name] of fields) settings[name] = elements[name].value === "" ? null : Number(elements[name].value);
  change({
    system: elements.system.value,
    settings,
    key: elements.key.value.trim(),
    remember: elements.remember.checked,
  });
}

export function settingsDialog() {
  const close = () => document.querySelector("#settings").close();
  const clear = () => {
    const { elements } = document.querySelector("#settings form");
    for (const [name] of fields) elements[name].value = "";
  };
  return html`<dialog id="settings" aria-labelledby="settings-title">
    <form method="dialog" @submit=${saveSettings}>
      <div class="dialog-head">
        <h2 id="settings-title">Settings</h2>
        <button type="button" class="icon quiet" @click=${close} aria-label="Close without saving">
          ${icon("close")}
        </button>
      </div>
      <div class="field wide">
        <label for="system">System prompt of this conversation</label>
        <textarea id="system" name="system" rows="3" placeholder="How the model should answer"></textarea>
      </div>
      <fieldset>
        <legend>Sampling <span class="soft">– empty: as the model's makers chose</span></legend>
        <div class="grid">
          ${fields.map(
            ([name, label, hint, bounds]) =>
              html`<div class="field">
                <label for=${name}>${label}</label>
                <input
                  id=${name}
                  name=${name}
                  type="number"
                  inputmode="decimal"
                  placeholder="default"
                  min=${bounds.min}
                  max=${bounds.max ?? ""}
                  step=${bounds.step}
                  aria-describedby=${`${name}-hint`}
                />
                <span class="tiny soft" id=${`${name}-hint`}>${hint}</span>
              </div>`,
          )}
        </div>
      </fieldset>
      <div class="field wide">
        <label for="key">API key</label>
        <input id="key" name="key" type="password" autocomplete="off" placeholder="only if this gateway needs one" />
        <label class="check"
          ><input type="checkbox" name="remember" /> Keep it in this browser (else until this tab is closed)</label
        >
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
