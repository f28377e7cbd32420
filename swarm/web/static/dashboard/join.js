// How to join, and whether a peer can be reached.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { seconds } from "../shared/ui.js";
import { problemNotice, takeaway } from "./parts.js";

export function checkResult(result) {
  if (!result) return nothing;
  if (result instanceof Error) return problemNotice(result.message);
  return html`<div class="notice ${result.reachable ? "" : "warn"}" role="status">
    <p>
      <strong>${result.reachable ? "✓" : "✕"} ${result.summary}</strong
      >${result.rtt_s === null ? nothing : html` <span class="soft num">${seconds(result.rtt_s)} there and back</span>`}
    </p>
    <ol class="checks small">
      ${result.checks.map(
        (each) =>
          html`<li>
            <span aria-hidden="true">${each.ok ? "✓" : "✕"}</span
            ><span class="hidden">${each.ok ? "works:" : "fails:"}</span> <bdi>${each.what}</bdi>
            <span class="soft"><bdi>${each.detail}</bdi></span>
          </li>`,
      )}
    </ol>
    ${result.hint ? html`<p class="small"><bdi>${result.hint}</bdi></p>` : nothing}
  </div>`;
}

export function joinPage({ join, update, check, checking, checked }) {
  if (join instanceof Error) return problemNotice(join.message);
  if (!join) return html`<p class="soft loading">Reading…</p>`;
  const submit = (event) => {
    event.preventDefault();
    const text = event.target.elements.whom.value.trim();
    if (text) check(text.startsWith("/") ? { address: text } : { peer_id: text });
  };
  const badge = `![swarm](${new URL("api/v1/badge.svg", location.href.replace(/#.*/, ""))})`;
  return html`
    <h1>Join this network</h1>
    <p class="soft measure">
      You need no account: the invite below is enough. Your computer takes the blocks that are needed most and fit into
      its memory, and downloads only their weights.
    </p>
    ${join.note ? html`<p class="notice warn">${join.note}</p>` : nothing}
    <section class="card">
      <h2>1. Install</h2>
      ${takeaway(join.install, "the command that installs", update)}
    </section>
    <section class="card">
      <h2>2. Serve blocks of a model</h2>
      ${
        join.commands.length
          ? join.commands.map(
              (each) =>
                html`<div class="command">
                  <h3><bdi>${each.model_name}</bdi></h3>
                  ${takeaway(each.command, `the command for ${each.model_name}`, update)}
                  ${each.note ? html`<p class="small soft">${each.note}</p>` : nothing}
                </div>`,
            )
          : html`<p class="soft">Nobody serves a model yet. Start one:</p>
              ${takeaway(`swarm join MODEL --invite ${join.invite}`, "the command", update)}`
      }
    </section>
    <section class="card">
      <h2>Invite</h2>
      <p class="small soft">For <code>--invite</code> of every command: chat, generate, gateway, status.</p>
      ${takeaway(join.invite, "the invite", update)}
    </section>
    <section class="card">
      <h2>Is my peer reachable?</h2>
      <form class="check" @submit=${submit}>
        <label for="whom">Its id, or its address with <code>/p2p/</code> at the end</label>
        <div class="line">
          <input
            id="whom"
            name="whom"
            class="mono"
            autocomplete="off"
            spellcheck="false"
            placeholder="12D3KooW…"
            maxlength="256"
            required
          />
          <button class="primary" ?disabled=${checking}>${checking ? "Dialling…" : "Dial it"}</button>
        </div>
      </form>
      ${checkResult(checked)}
    </section>
    <section class="card">
      <h2>Badge</h2>
      <p><img src="api/v1/badge.svg" alt="Badge: the swarm's health now" /></p>
      ${takeaway(badge, "the badge in Markdown", update)}
    </section>
  `;
}
