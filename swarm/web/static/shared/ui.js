// What the pages share: words for numbers, colours for canvases, the theme button, icons.

import { html } from "../vendor/lit-html/lit-html.js";

/** Seconds as people say them: 3.2 ms, 41 ms, 1.25 s, 3 min. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return duration(value);
}

/** A length of time, coarsely: 4 s, 12 min, 3 h 10 min, 2 d 4 h. */
export function duration(value) {
  const total = Math.max(0, Math.round(value));
  if (total < 90) return `${total} s`;
  const minutes = Math.round(total / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${hours / 24} d`;
}

export function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Tokens per second: one digit behind the point where that says anything. */
export function rate(value) {
  return value === null || value === undefined ? "–" : number(value, value < 100 ? 1 : 0);
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${value.toFixed(at && value < 10 ? 1 : 0)} ${units[at]}`;
}

/** A function that has `draw` called with the next frame, however often it is called before. */
export function onceAFrame(draw) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      draw();
    });
  };
}

/** The end of a peer id: its beginning is the same for all. */
export function shortId(id) {
  return id.length > 10 ? `…${id.slice(-8)}` : id;
}

/** `[start, end)` as every command writes it. */
export const blocks = ([start, end]) => `${start}:${end}`;

const resolved = new Map();
document.documentElement.addEventListener("themechange", () => resolved.clear());

/** What a custom property is in the present theme, in a form that a canvas takes. */
export function color(name) {
  if (!resolved.has(name)) {
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    resolved.set(name, getComputedStyle(probe).color);
    probe.remove();
  }
  return resolved.get(name);
}

/** A canvas as sharp as the screen; returns its context, width and height in CSS pixels. */
export function prepare(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

export const media = (query) => matchMedia(query).matches;
export const calm = () => media("(prefers-reduced-motion: reduce)");

const paths = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20l1-4L16 5l3 3L8 19z",
  retry: "M19 12a7 7 0 1 1-2-5M17 3v4h-4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  settings: "M5 8h8M17 8h2M5 16h2M11 16h8M15 6v4M9 14v4",
  route: "M6 4a2 2 0 1 0 0 4 2 2 0 0 0 0-4zM18 16a2 2 0 1 0 0 4 2 2 0 0 0 0-4zM8 6h7a3 3 0 0 1 0 6H9a3 3 0 0 0 0 6h7",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 3v1M12 20v1M3 12h1M20 12h1M5.6 5.6l.7.7M17.7 17.7l.7.7M5.6 18.4l.7-.7M17.7 6.3l.7-.7",
  dark: "M19 14.5A8 8 0 0 1 9.5 5 7.5 7.5 0 1 0 19 14.5z",
  search: "M10.5 5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11zM15 15l5 5",
};

/** A line drawing beside words, or in a button that has a label: says nothing to a screen reader. */
export function icon(name) {
  return html`<svg
    viewBox="0 0 24 24"
    fill="none"
    stroke="currentColor"
    stroke-width="1.75"
    stroke-linecap="round"
    stroke-linejoin="round"
    aria-hidden="true"
  >
    <path d=${paths[name]}></path>
  </svg>`;
}

const themeNames = { auto: "as the system", light: "light", dark: "dark" };

export function themeButton(changed) {
  const name = window.hiveTheme.name;
  const label = `Colours: ${themeNames[name]}. Change`;
  const next = () => {
    window.hiveTheme.next();
    changed();
  };
  return html`<button class="icon quiet" @click=${next} aria-label=${label} title=${label}>${icon(name)}</button>`;
}

/** Whether the text came to the clipboard. Also where a page without TLS may not use the clipboard's own interface. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden";
    (document.querySelector("dialog[open]") || document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
