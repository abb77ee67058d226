// Sends requests to the server.
import { announce } from "./messages.js";

const LIMIT_MS = 10_000; // of one attempt
const ATTEMPTS = 3;
const LONGEST_PAUSE_SECONDS = 5;

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The answer came after the user had signed out: nobody may see it.
export class Abandoned extends Error {}

let life = new AbortController();

// Abandons every request that has no answer yet.
export function abandonRequests() {
  life.abort();
  life = new AbortController();
}

// Returns the parsed answer and its ETag. A 503 with Retry-After means that nothing was changed, so
// the request is sent again.
export async function call(method, path, body, { headers = {}, keepalive = false } = {}) {
  const { signal } = life;
  for (let attempt = 1; ; attempt++) {
    const { response, text } = await answer(path, {
      method,
      keepalive,
      headers: body === undefined ? headers : { "content-type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.any([signal, AbortSignal.timeout(LIMIT_MS)]),
    });
    const pause = Number(response.headers.get("retry-after") ?? NaN);
    const later = response.status === 503 && pause >= 0 && pause <= LONGEST_PAUSE_SECONDS;
    if (!later || attempt === ATTEMPTS) return read(response, text);
    announce("The server is busy. Trying again…");
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
    if (signal.aborted) throw new Abandoned();
  }
}

async function answer(path, init) {
  try {
    const response = await fetch(path, init);
    return { response, text: await response.text() };
  } catch (error) {
    if (error.name === "AbortError") throw new Abandoned();
    throw new Refusal(
      0,
      error.name === "TimeoutError"
        ? "The server did not answer in time. Please try again."
        : "The server cannot be reached. Please try again.",
    );
  }
}

function read(response, text) {
  let said;
  try {
    said = text === "" ? null : JSON.parse(text);
  } catch {
    throw new Refusal(response.status, "The server gave an answer that this page cannot read.");
  }
  if (response.ok) return { said, etag: response.headers.get("etag") };
  // FastAPI answers with problem details, Better Auth with a message.
  const reason = said?.detail ?? said?.message ?? said?.title;
  throw new Refusal(
    response.status,
    typeof reason === "string" && reason !== "" ? reason : `It did not work (${response.status}).`,
  );
}
