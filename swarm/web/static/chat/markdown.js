// What a model wrote, as a page may show it. Its text is a stranger's: HTML in it is shown as text, images (which would
// be fetched from wherever it says) become links, and what is left passes DOMPurify.

import DOMPurify from "../vendor/dompurify/purify.es.mjs";
import { Marked } from "../vendor/marked/marked.esm.js";
import { copy } from "../shared/ui.js";

const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
  },
});

const allowed = {
  ALLOWED_TAGS:
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/**
 * Show `text` inside `element`. Called again with a longer text, it leaves the paragraphs alone that are as they were,
 * so that what somebody is reading or selecting stays.
 */
export function show(element, text) {
  const tokens = marked.lexer(text);
  const shown = (element.shownBlocks ??= []);
  let at = 0;
  for (const token of tokens) {
    if (token.type === "space") continue;
    if (shown[at]?.raw !== token.raw) {
      const block = document.createElement("div");
      block.className = "block";
      block.append(DOMPurify.sanitize(marked.parser(Object.assign([token], { links: tokens.links })), allowed));
      for (const pre of block.querySelectorAll("pre")) addCopy(pre);
      if (shown[at]) shown[at].block.replaceWith(block);
      else element.append(block);
      shown[at] = { raw: token.raw, block };
    }
    at += 1;
  }
  for (const { block } of shown.splice(at)) block.remove();
}

function addCopy(pre) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy-code";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy this code");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(pre.querySelector("code").textContent)) ? "Copied" : "Cannot copy";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const holder = document.createElement("div");
  holder.className = "code";
  pre.tabIndex = 0; // it scrolls sideways: also with the keyboard
  pre.replaceWith(holder);
  holder.append(pre, button);
}
