// Four small charts of the last hours, by uPlot (a script of its own: window.uPlot).

import { html } from "../vendor/lit-html/lit-html.js";
import { color, number, rate } from "../shared/ui.js";

const kinds = [
  { key: "stream_tokens_per_s", title: "One conversation", unit: "tokens/s", ink: "--hop-1", show: rate },
  { key: "total_tokens_per_s", title: "All users together", unit: "tokens/s", ink: "--hop-2", show: rate },
  { key: "online", title: "Peers online", unit: "", ink: "--hop-5", show: number, whole: true },
  {
    key: "replication",
    title: "Holders of the rarest block",
    unit: "",
    ink: "--hop-4",
    show: number,
    whole: true,
    steps: true,
  },
];
const HEIGHT = 132;
const wholeSteps = [1, 10, 100, 1000, 10000, 100000].flatMap((power) => [power, 2 * power, 5 * power]);
const hourAndMinute = (atS) => new Date(atS * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

/** uPlot wants columns; a pause of the dashboard is a hole, not a line. */
function columns(history) {
  const [times, values] = [[], kinds.map(() => [])];
  for (const point of history.points) {
    const last = times.at(-1);
    if (last !== undefined && point.at_s - last > 2.5 * history.interval_s) {
      times.push(last + history.interval_s);
      values.forEach((column) => column.push(null));
    }
    times.push(point.at_s);
    kinds.forEach(({ key }, at) => values[at].push(point[key]));
  }
  return { times, values };
}

function options({ title, ink, show, whole, steps }, width) {
  const axis = () => ({
    stroke: () => color("--soft"),
    grid: { stroke: () => color("--line"), width: 1 },
    ticks: { show: false },
    font: "11px sans-serif",
  });
  return {
    width,
    height: HEIGHT,
    padding: [null, 28, null, null], // half of the last time of day
    legend: { show: false },
    cursor: { y: false, points: { size: 6 } },
    scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.15 : 1] } },
    axes: [
      { ...axis(), grid: { show: false }, size: 24, space: 64, values: (_, ticks) => ticks.map(hourAndMinute) },
      {
        ...axis(),
        ...(whole ? { incrs: wholeSteps } : {}),
        size: 44,
        values: (_, ticks) => ticks.map((tick) => number(tick, tick % 1 ? 1 : 0)),
      },
    ],
    series: [
      {},
      {
        label: title,
        stroke: () => color(ink),
        width: 2,
        fill: () => color(ink).replace("rgb(", "rgba(").replace(")", ", 0.12)"),
        points: { show: false },
        paths: steps ? window.uPlot.paths.stepped({ align: 1 }) : undefined,
      },
    ],
    hooks: {
      setCursor: [
        (plot) => {
          const at = plot.cursor.idx;
          const value = at === null || at === undefined ? null : plot.data[1][at];
          plot.root.parentElement.nextElementSibling.textContent =
            value === null || value === undefined ? "" : `${show(value)} at ${hourAndMinute(plot.data[0][at])}`;
        },
      ],
    },
  };
}

const drawn = new Map();

/** Draw what changed into the places that `charts` left, and forget plots whose place is gone. After every render. */
export function drawCharts(history) {
  for (const [at, { element, plot }] of drawn) {
    if (!element.isConnected) {
      plot.destroy();
      drawn.delete(at);
    }
  }
  for (const element of document.querySelectorAll("[data-chart]"))
    draw(Number(element.dataset.chart), element, history);
}

function draw(at, element, history) {
  const known = drawn.get(at);
  const width = element.clientWidth;
  if (!known) {
    const { times, values } = columns(history);
    drawn.set(at, {
      element,
      history,
      plot: new window.uPlot(options(kinds[at], width), [times, values[at]], element),
    });
    return;
  }
  if (known.plot.width !== width) known.plot.setSize({ width, height: HEIGHT });
  if (known.history !== history) {
    const { times, values } = columns(history);
    known.plot.setData([times, values[at]]);
    known.history = history;
  }
}

/** Other colours: everything is drawn anew. */
export function forgetCharts() {
  for (const { plot } of drawn.values()) plot.destroy();
  drawn.clear();
}

export function charts(history) {
  if (history instanceof Error) return html`<p class="notice bad">${history.message}</p>`;
  if (!history) return html`<p class="soft">Reading…</p>`;
  if (history.points.length < 2) {
    return html`<p class="soft">
      Nothing to show yet: a point is kept every ${Math.round(history.interval_s)} s while the dashboard runs.
    </p>`;
  }
  const last = history.points.at(-1);
  return html`<div class="charts">
    ${kinds.map(
      ({ key, title, unit, show }, at) =>
        html`<figure>
          <figcaption>
            <span class="small">${title}</span> <strong class="num">${show(last[key])}</strong>
            <span class="tiny soft">${unit}</span>
          </figcaption>
          <div
            class="plot"
            role="img"
            aria-label=${summary(
              title,
              unit,
              history.points.map((point) => point[key]),
              show,
            )}
            data-chart=${at}
          ></div>
          <p class="tiny soft num at-cursor"></p>
        </figure>`,
    )}
  </div>`;
}

function summary(title, unit, values, show) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return `${title}: not known`;
  return `${title}: now ${show(known.at(-1))}, from ${show(Math.min(...known))} to ${show(Math.max(...known))} ${unit}`;
}
