// From the form's fields to a request, and from the two kinds of streamed chunks to one.

/** Alternatives that are asked for with each token. */
const ALTERNATIVES = 5;

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed"];

/** What the parameters' form says; fields that are empty are left to the server. */
export function parameters(form) {
  const values = new FormData(form);
  const fields = {};
  for (const name of NUMBERS) {
    const value = values.get(name).trim();
    if (value !== "") fields[name] = Number(value);
  }
  const stop = values.get("stop_text");
  if (stop) fields.stop = stop;
  return { fields, logprobs: values.has("logprobs"), system: values.get("system").trim() };
}

/** The parameters in a few words. */
export function describe({ fields, system }) {
  const names = { top_p: "top p", top_k: "top k", max_tokens: "up to", repetition_penalty: "penalty" };
  const said = Object.entries(fields)
    .filter(([name]) => name !== "stop")
    .map(([name, value]) => `${names[name] ?? name} ${value}${name === "max_tokens" ? " tokens" : ""}`);
  if (system) said.unshift("system message");
  if (fields.stop) said.push("stop");
  return said.join(" · ");
}

/** Path and body for a conversation: `turns` is a list of { role, content }. */
export function chat(turns, { fields, logprobs, system }) {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const body = { ...fields, messages, stream_options: { include_usage: true } };
  if (logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return { path: "v1/chat/completions", body, read: readChat };
}

/** Path and body for the continuation of a text. */
export function completion(prompt, { fields, logprobs }) {
  const body = { ...fields, prompt, stream_options: { include_usage: true } };
  if (logprobs) body.logprobs = ALTERNATIVES;
  return { path: "v1/completions", body, read: readCompletion };
}

// A chunk becomes { text, thoughts, tokens, finish, usage }; a token is { text, logprob, top: [{ text, logprob }] }.

function readChat(chunk) {
  const choice = chunk.choices[0];
  const named = ({ token, logprob }) => ({ text: token, logprob });
  return {
    text: choice?.delta?.content ?? "",
    thoughts: choice?.delta?.reasoning_content ?? "",
    tokens: (choice?.logprobs?.content ?? []).map((token) => ({
      ...named(token),
      top: token.top_logprobs.map(named),
    })),
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}

function readCompletion(chunk) {
  const choice = chunk.choices[0];
  const list = choice?.logprobs;
  return {
    text: choice?.text ?? "",
    thoughts: "",
    tokens: (list?.tokens ?? []).map((text, index) => ({
      text,
      logprob: list.token_logprobs[index],
      top: Object.entries(list.top_logprobs[index] ?? {}).map(([text, logprob]) => ({ text, logprob })),
    })),
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}
