// Requests to the server: the key, errors as the API words them, streams of events.

const KEY = "mxserve-api-key";

/** An error that the server answered, or that kept it from answering (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, type = "", param = null } = {}) {
    super(message);
    Object.assign(this, { status, type, param });
  }

  /** From an answer's body, as text or as parsed JSON. */
  static of(status, body) {
    const error = body?.error;
    if (!error) return new ApiError(`The server answered with status ${status}.`, { status });
    return new ApiError(error.message, { status: error.code ?? status, type: error.type, param: error.param });
  }
}

/** The API key, kept for as long as the tab is. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

/** Fetches a path below this page; an answer that is no success throws an ApiError. */
export async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get() && path.startsWith("v1/")) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const parsed = await response.json().catch(() => null);
  throw ApiError.of(response.status, parsed);
}

/** The JSON events of a streamed answer, until [DONE]. An event that is an error is thrown. */
export async function* stream(path, body, signal) {
  const response = await request(path, { method: "POST", body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the answer's end.");
      });
      if (done) throw new ApiError("The connection ended before the answer did.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        // Lines that begin with a colon keep the connection open and say nothing.
        if (!event.startsWith("data: ")) continue;
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw ApiError.of(parsed.error.code, parsed);
        yield parsed;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
