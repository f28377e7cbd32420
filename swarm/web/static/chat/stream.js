// One streamed answer of the gateway's API. Knows no page: it yields what came, and throws a Trouble that says in words
// what went wrong and whether it is worth trying again.

export class Trouble extends Error {
  /**
   * `kind`: key, busy, down, lost, refused. `retryAfterS`: what the server asked for, or null. `detail`: all that it
   * said, where `message` has only the beginning.
   */
  constructor(kind, message, { retryAfterS = null, detail = null } = {}) {
    super(message);
    this.kind = kind;
    this.retryAfterS = retryAfterS;
    this.detail = detail;
  }
}

const LONG = 160;

/** What a server said as a sentence takes it, and all of it where that is much: which peers failed, and how. */
function brief(said) {
  return said.length <= LONG ? [said, null] : [said.split(/; | \(/, 1)[0], said];
}

const sentences = {
  401: ["key", "The gateway needs an API key that it knows."],
  429: ["busy", "The gateway is full, or this key has asked too often."],
  503: ["down", "Nobody in the swarm can answer now."],
};

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("lost", "The gateway cannot be reached. Is it still running?");
  }
}

async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    // something between us and the gateway answered
  }
  const [kind, sentence] = sentences[response.status] ?? [
    response.status >= 500 ? "down" : "refused",
    `The gateway answered ${response.status}.`,
  ];
  const retryAfter = Number(response.headers.get("retry-after"));
  const [words, detail] = brief(said);
  const refused = kind === "refused" ? `The gateway refuses this: ${words}` : `${sentence} (${words})`;
  const message = said ? refused : sentence;
  return new Trouble(kind, message, { retryAfterS: retryAfter > 0 ? retryAfter : null, detail });
}

/** The models that the gateway serves: `{id, max_model_len}`. */
export async function models(key) {
  const response = await reach("v1/models", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

/** Why answers of this model wait for peers just now, `{text, detail}`; null where they do not, or nobody can say. */
export async function waitedFor(model) {
  try {
    const response = await fetch("health");
    const said = (await response.json()).models[model]?.waiting;
    if (!said) return null;
    const [text, detail] = brief(said);
    return { text, detail };
  } catch {
    return null; // the answer itself will tell
  }
}

/** Chunks of one answer as they come; returns when the gateway says that it is whole. */
export async function* answer(body, key, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment that keeps the connection alive
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) {
          const [words, detail] = brief(chunk.error.message);
          throw new Trouble("down", `The answer broke off: ${words}`, { detail });
        }
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Trouble) throw error;
    throw new Trouble("lost", "The connection was lost in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Trouble("lost", "The connection ended in the middle of the answer.");
}
