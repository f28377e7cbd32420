// Where the tokens of an answer went: the route as a list of hops that light up, the sum of every hop's time, and one
// column per token. Owns the sums, not how they come.

import { html, nothing } from "../vendor/lit-html/lit-html.js";
import { repeat } from "../vendor/lit-html/directives/repeat.js";
import { blocks, calm, color, number, prepare, seconds, shortId } from "../shared/ui.js";

const COLUMNS = 60;
const HOP_COLORS = 6;
const hopColor = (at) => `--hop-${(at % HOP_COLORS) + 1}`;

/** What one answer's steps add up to; plain data, kept with its message. `last`: the newest step. */
export function newTrace() {
  return {
    last: null,
    promptPositions: 0,
    tokens: 0,
    totalS: 0,
    computeS: 0,
    queueS: 0,
    columns: [],
    met: [],
    changes: 0,
  };
}

/** One step more. The prompt's is counted apart: its parts travel at once, so its hops' times do not add up to it. */
export function addStep(trace, step) {
  const prompt = trace.last === null;
  trace.last = step;
  if (prompt) trace.promptPositions = step.positions;
  else {
    trace.tokens += 1;
    trace.totalS += step.total_s;
    for (const hop of step.hops) {
      trace.computeS += hop.compute_s;
      trace.queueS += hop.queue_s;
    }
    trace.columns.push(step.hops.map((hop) => hop.queue_s + hop.compute_s).concat(step.total_s));
    if (trace.columns.length > COLUMNS) trace.columns.shift();
  }
  // a step that was repaired names only the hops that ran it then, so: is there one that was not met before?
  const strange = step.hops.map((hop) => `${hop.peer_id} ${hop.blocks[0]}`).filter((hop) => !trace.met.includes(hop));
  if (trace.met.length && strange.length) trace.changes += 1;
  trace.met.push(...strange);
}

function bar(hop, at, longestS) {
  const width = (value) => `width:${longestS > 0 ? Math.max(0, (100 * value) / longestS) : 0}%`;
  return html`<div class="hop-bar" aria-hidden="true">
    <span class="queue" .style=${width(hop.queue_s)}></span>
    <span class="compute" .style=${`${width(hop.compute_s)};background:var(${hopColor(at)})`}></span>
  </div>`;
}

function hopView(hop, at, longestS) {
  return html`<li class="hop" data-hop=${at}>
    <span class="dot" .style=${`--hop:var(${hopColor(at)})`} aria-hidden="true"></span>
    <div class="hop-text">
      <div class="hop-head">
        <span class="mono" title=${hop.peer_id}>${shortId(hop.peer_id)}</span>
        <span class="soft tiny">blocks ${blocks(hop.blocks)}</span>
      </div>
      ${bar(hop, at, longestS)}
      <div class="tiny soft num">computes ${seconds(hop.compute_s)}, waits ${seconds(hop.queue_s)}</div>
    </div>
  </li>`;
}

/** The panel. `trace`: of the answer under way, or of the last one; null: there was none yet. */
export function routeView(trace, { live }) {
  if (trace === null || trace.last === null) {
    return html`<div class="route-empty">
      <p>Ask something, and see which peers compute each token and where the time goes.</p>
    </div>`;
  }
  const hops = trace.last.hops;
  const longestS = Math.max(...hops.map((hop) => hop.compute_s + hop.queue_s), 1e-9);
  const rest = trace.last.total_s - hops.reduce((sum, hop) => sum + hop.compute_s + hop.queue_s, 0);
  const prompt = trace.tokens === 0;
  const { computeS, queueS } = trace;
  const networkS = Math.max(0, trace.totalS - computeS - queueS);
  const part = (value) => (trace.totalS > 0 ? (100 * value) / trace.totalS : 0);
  const row = (name, kind, value) =>
    html`<div class="share">
      <span class="swatch ${kind}" aria-hidden="true"></span>
      <dt>${name}</dt>
      <dd class="num">
        ${number(part(value))} % <span class="soft">${seconds(value / Math.max(1, trace.tokens))}</span>
      </dd>
    </div>`;
  return html`
    <p class="small soft" id="route-now">
      ${prompt ? html`The prompt's ${trace.promptPositions} new positions` : html`Token ${number(trace.tokens + 1)}`}:
      <span class="num">${seconds(trace.last.total_s)}</span> through ${hops.length}
      ${hops.length === 1 ? "peer" : "peers"}
    </p>
    <ol class="hops ${live ? "live" : ""}">
      <li class="end small soft">you</li>
      ${repeat(
        hops,
        (hop) => `${hop.peer_id} ${hop.blocks[0]}`,
        (hop, at) => hopView(hop, at, longestS),
      )}
      <li class="end small soft">
        you${prompt ? nothing : html`, <span class="num">${seconds(Math.max(0, rest))}</span> on the way`}
      </li>
    </ol>
    ${
      trace.tokens === 0
        ? nothing
        : html`<h3>Where the time went</h3>
            <div class="shares-bar" aria-hidden="true">
              <span class="compute" .style=${`width:${part(computeS)}%`}></span>
              <span class="queue" .style=${`width:${part(queueS)}%`}></span>
              <span class="network" .style=${`width:${part(networkS)}%`}></span>
            </div>
            <dl class="shares small">
              ${row("Computing", "compute", computeS)} ${row("Waiting at peers", "queue", queueS)}
              ${row("On the way", "network", networkS)}
            </dl>
            <h3>Token by token</h3>
            <canvas
              id="columns"
              role="img"
              aria-label=${`Time of the last ${trace.columns.length} tokens, the longest ${seconds(longest(trace))}`}
            ></canvas>
            <p class="tiny soft num">
              the last ${trace.columns.length} tokens, the longest ${seconds(longest(trace))}
            </p>`
    }
    ${trace.changes ? html`<p class="small">The route changed ${trace.changes === 1 ? "once" : `${trace.changes} times`} during this answer.</p>` : nothing}
  `;
}

const longest = (trace) => Math.max(...trace.columns.map((column) => column.at(-1)), 0);

/** One column per token: every hop's part in its colour, what lay between them above. */
export function drawColumns(canvas, trace) {
  const { context, width, height } = prepare(canvas);
  const step = width / COLUMNS;
  const most = longest(trace) || 1;
  trace.columns.forEach((column, at) => {
    const x = width - (trace.columns.length - at) * step;
    let y = height;
    const total = (column.at(-1) / most) * height;
    context.fillStyle = color("--strong-line");
    context.fillRect(x, height - total, step - 1, total);
    column.slice(0, -1).forEach((value, hop) => {
      const part = (value / most) * height;
      y -= part;
      context.fillStyle = color(hopColor(hop));
      context.fillRect(x, y, step - 1, part);
    });
  });
}

/** Light up `dots`, one for each hop, one after another, as the token passed them. */
export function pulse(dots) {
  if (calm()) return;
  dots.forEach((dot, at) => {
    dot.animate(
      [
        { boxShadow: "0 0 0 0 color-mix(in srgb, var(--hop) 70%, transparent)", transform: "scale(1.35)" },
        { boxShadow: "0 0 0 9px transparent", transform: "scale(1)" },
      ],
      { duration: 420, delay: at * 70, easing: "ease-out" },
    );
  });
}
