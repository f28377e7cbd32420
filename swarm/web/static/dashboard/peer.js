// One peer: everything that is known of it, and how old that is.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { blocks, bytes, duration, number, seconds } from "../shared/ui.js";
import { age, eventList, peerLink, problemNotice, spansText, statePill, takeaway } from "./parts.js";
import { checkResult } from "./join.js";

const fact = (name, value) =>
  html`<div class="fact">
    <dt class="small soft">${name}</dt>
    <dd>${value}</dd>
  </div>`;
const bar = (part, whole) =>
  whole > 0 ? html`<meter min="0" max=${whole} value=${Math.min(part, whole)} aria-hidden="true"></meter>` : nothing;

function card(title, note, content) {
  return html`<section class="card">
    <div class="head">
      <h2>${title}</h2>
      <span class="small soft">${note}</span>
    </div>
    ${content}
  </section>`;
}

export function peerPage({ live, peer, update, check, checking, checked }) {
  const back = html`<p class="small"><a href="#/peers">All peers</a></p>`;
  if (peer instanceof Error) {
    return html`${back}${problemNotice(peer.status === 404 ? "No such peer was seen lately. It may have gone for longer than ten minutes." : peer.message)}`;
  }
  if (!peer)
    return html`${back}
      <p class="soft loading">Reading…</p>`;
  const row = { ...peer, ...live.peers.get(peer.peer_id) };
  const { status } = peer;
  const heard = `its record, read ${age(live.ageS(row.record_at_s))}`;
  const answered = status ? `its own answer, ${age(live.ageS(status.at_s))}` : "it never answered";
  return html`
    ${back}
    <div class="peer-head">
      <h1><bdi>${row.name || "Peer without a name"}</bdi></h1>
      ${statePill(row.state)}
      ${row.gone_at_s ? html`<span class="small soft">${age(live.ageS(row.gone_at_s))}</span>` : nothing}
    </div>
    ${takeaway(row.peer_id, "the peer's id", update)}
    ${row.problem ? html`<p class="notice warn"><strong>It does not answer:</strong> <bdi>${row.problem}</bdi>. What is shown of its load is from ${age(live.ageS(row.status_at_s))}.</p>` : nothing}
    <div class="cards">
      ${card(
        "What it serves",
        heard,
        html`<dl class="facts">
          ${fact("Model", html`<bdi>${row.model_name}</bdi>`)}
          ${fact("Blocks", html`${spansText(row.spans)} <span class="soft">of ${number(peer.num_blocks)}</span>`)}
          ${peer.intent ? fact("About to move to", `blocks ${blocks(peer.intent)}`) : nothing}
          ${status?.moved_from.length ? fact("Moved from", `blocks ${spansText(status.moved_from)}, ${age(live.ageS(status.moved_at_s))}`) : nothing}
          ${fact("Computes in", row.dtype)}
          ${fact("Weights", row.quantization === "none" ? "unquantized" : row.quantization)}
          ${peer.adapters.length ? fact("Adapters", peer.adapters.join(", ")) : nothing}
          ${fact("Placement", peer.max_blocks === null ? "fixed by its owner" : `moves by itself, up to ${peer.max_blocks} blocks`)}
          ${fact("Version", html`<bdi>${row.version}</bdi>, protocol ${peer.protocol}`)}
          ${fact("First seen", age(live.ageS(row.first_seen_at_s)))}
          ${fact("Uptime", status ? duration(status.uptime_s + (live.ageS(status.at_s) ?? 0)) : "–")}
          ${fact("Record expires", live.nowS < peer.expires_at_s ? `in ${duration(peer.expires_at_s - live.nowS)}` : "has expired")}
          ${fact("Bandwidth", peer.max_bytes_per_s === null ? "unlimited" : `${bytes(peer.max_bytes_per_s)}/s each way`)}
          ${peer.uplink_bytes_per_s === null ? nothing : fact("Uplink", `about ${bytes(peer.uplink_bytes_per_s)}/s, as measured`)}
        </dl>`,
      )}
      ${card(
        "Load",
        answered,
        html`<dl class="facts">
          ${fact("KV cache", html`${number(row.cache_tokens - row.free_tokens)} of ${number(row.cache_tokens)} tokens used, ${number(row.free_tokens)} free ${bar(row.cache_tokens - row.free_tokens, row.cache_tokens)}`)}
          ${status ? fact("Pages", html`${number(status.free_pages)} of ${number(status.pages)} free, ${number(status.kept_pages)} of them kept`) : nothing}
          ${fact("Queue", html`${seconds(row.queue_s)}${row.queued_tokens === null || row.queued_tokens === undefined ? nothing : html`, ${number(row.queued_tokens)} tokens`}`)}
          ${fact("Sessions", number(row.sessions))}
          ${
            status
              ? html` ${fact("Memory", html`${bytes(status.memory_used_bytes)} used of ${bytes(status.memory_offered_bytes)} offered ${bar(status.memory_used_bytes, status.memory_offered_bytes)}`)}
                ${fact("Device", html`<bdi>${status.device}</bdi>`)}
                ${fact("Computed", `${number(status.steps)} steps, ${number(status.tokens)} tokens`)}
                ${fact("Refused", `${number(status.refused)} steps for want of room`)}`
              : nothing
          }
        </dl>`,
      )}
      ${card(
        "Time per block",
        answered,
        html`<table class="plain-table">
          <thead>
            <tr>
              <td></td>
              <th scope="col">one token</th>
              <th scope="col">of a prompt, per token</th>
            </tr>
          </thead>
          <tbody>
            <tr>
              <th scope="row">alone, at its start</th>
              <td class="num">${seconds(row.decode_s_per_block)}</td>
              <td class="num">${seconds(row.prefill_s_per_token_block)}</td>
            </tr>
            <tr>
              <th scope="row">lately, at work</th>
              <td class="num">${seconds(status?.lately?.decode_s)}</td>
              <td class="num">${seconds(status?.lately?.prefill_s_per_token)}</td>
            </tr>
          </tbody>
        </table>`,
      )}
      ${card(
        "Reached at",
        heard,
        html` ${
            peer.addresses.length
              ? html`<ul class="addresses">
                  ${peer.addresses.map(
                    (each) =>
                      html`<li>
                        <code><bdi>${each.address}</bdi></code>
                        <span class="pill">${each.relayed ? "relayed" : "direct"}</span
                        >${each.public ? html` <span class="pill good">public</span>` : nothing}
                      </li>`,
                  )}
                </ul>`
              : html`<p class="soft">It announces no address.</p>`
          }
          <p class="actions">
            <button @click=${() => check({ peer_id: peer.peer_id })} ?disabled=${checking}>
              ${checking ? "Dialling…" : "Dial it from here"}
            </button>
          </p>
          ${checkResult(checked)}`,
      )}
      ${card(
        "Round trips",
        "measured by either end",
        peer.round_trips.length
          ? html`<table class="plain-table">
              <thead>
                <tr>
                  <th scope="col">to</th>
                  <th scope="col">time</th>
                  <th scope="col">measured by</th>
                  <th scope="col">when</th>
                </tr>
              </thead>
              <tbody>
                ${
                  row.rtt_s === null
                    ? nothing
                    : html`<tr>
                        <td>this dashboard</td>
                        <td class="num">${seconds(row.rtt_s)}</td>
                        <td>the dashboard</td>
                        <td>${age(live.ageS(row.status_at_s))}</td>
                      </tr>`
                }
                ${peer.round_trips.map(
                  (trip) =>
                    html`<tr>
                      <td>${peerLink(trip)}</td>
                      <td class="num">${seconds(trip.rtt_s)}</td>
                      <td>${trip.measured_by_it ? "this peer" : "the other"}</td>
                      <td>${age(live.ageS(trip.at_s))}</td>
                    </tr>`,
                )}
              </tbody>
            </table>`
          : html`<p class="soft">
              Nobody has told any yet.${row.rtt_s === null ? nothing : ` From here: ${seconds(row.rtt_s)}.`}
            </p>`,
      )}
      ${card("Reputation", "what others have against it", opinions(peer.reputation, live, "Nobody has anything against it."))}
      ${peer.opinions.length ? card("Its own opinions", "what it has against others", opinions(peer.opinions, live, "")) : nothing}
      ${card("Events", "", peer.events.length ? eventList(peer.events, live.nowS) : html`<p class="soft">Nothing has happened since the dashboard began to look.</p>`)}
    </div>
  `;
}

function opinions(list, live, none) {
  if (!list.length) return html`<p class="soft">${none}</p>`;
  return html`<ul class="opinions">
    ${list.map(
      (each) =>
        html`<li>
          ${peerLink(each)}: ${number(each.strikes, 1)}
          strikes${each.backed_off_until_s !== null && each.backed_off_until_s > live.nowS ? html`, left alone for ${duration(each.backed_off_until_s - live.nowS)}` : nothing}
          <span class="soft">– <bdi>${each.reason}</bdi>, ${age(live.ageS(each.at_s))}</span>
        </li>`,
    )}
  </ul>`;
}
