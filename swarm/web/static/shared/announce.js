// What a screen reader says of what happens, beside what the page shows.

const place = document.querySelector("#announcer");

/** Reads an answer out sentence by sentence: single words would be spoken over one another. */
export class Announcer {
  #waiting = "";

  add(text) {
    this.#waiting += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.#waiting.lastIndexOf(mark)));
    if (end < 0) return;
    announce(this.#waiting.slice(0, end + 1));
    this.#waiting = this.#waiting.slice(end + 1);
  }

  end() {
    if (this.#waiting) announce(this.#waiting);
  }
}

export function announce(text) {
  const line = document.createElement("p");
  line.textContent = text;
  place.append(line);
  while (place.childElementCount > 20) place.firstElementChild.remove();
}
