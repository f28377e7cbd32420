// The chat page: draws what the conversation is whenever it changes, and hears the keys that work everywhere.

import { render } from "../vendor/lit-html/lit-html.js";
import { media, onceAFrame } from "../shared/ui.js";
import { loadModels, newChat, shownTrace, state, stop, whenChanged } from "./conversation.js";
import { show } from "./markdown.js";
import { drawColumns, pulse } from "./route.js";
import { leaveEditing, page, startAnew } from "./view.js";

const app = document.querySelector("#app");

let lit = null; // the step that the route was lit up for last

const drawSoon = onceAFrame(draw);
const update = ({ now = false } = {}) => (now ? draw() : drawSoon());

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
  if (state.running && trace.last !== lit) {
    lit = trace.last;
    for (const dots of ["#route .dot", ".strip .dot"]) pulse(document.querySelectorAll(dots));
  }
  const scroller = document.querySelector("#scroller");
  if (state.following) scroller.scrollTop = scroller.scrollHeight;
}

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    startAnew();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) {
    if (state.editing !== null) leaveEditing();
    else stop();
  }
});

whenChanged(update);
newChat();
loadModels();
if (media("(min-width: 701px)"))
  requestAnimationFrame(() => requestAnimationFrame(() => document.querySelector("#draft").focus()));
document.documentElement.addEventListener("themechange", () => update());
