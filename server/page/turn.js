// One turn of the exchange as it is shown: what was asked, or an answer while it comes.

import { duration, plural, rate } from "./format.js";
import { piece, scale } from "./tokens.js";

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

/** What was asked. `kind` is "user" or "prompt". */
export function question(kind, text) {
  const turn = element("li", `turn ${kind}`);
  turn.append(element("span", "sr-only", kind === "user" ? "You: " : "Prompt: "), element("div", "text", text));
  return turn;
}

const ENDS = { stop: "ended by itself", length: "cut at the limit", tool_calls: "calls a tool", content_filter: "filtered" };

/** An answer that grows. */
export class Answer {
  text = "";
  #held = [];
  #counted = 0;
  #started = performance.now();
  #first = null;
  #coloured = false;

  constructor(kind) {
    this.element = element("li", `turn answer ${kind}`);
    this.element.setAttribute("aria-busy", "true");
    this.#body = element("div", "text");
    this.#meta = element("div", "meta");
    this.element.append(element("span", "sr-only", "Answer: "), this.#body, this.#meta);
  }

  #body;
  #meta;

  /** Adds a chunk, as `requests.js` reads it. */
  add({ text, thoughts, tokens, finish, usage }) {
    if (tokens.length > 0 || text !== "" || thoughts !== "") this.#first ??= performance.now();
    if (thoughts !== "") this.#think(thoughts);
    this.text += text;
    this.#counted += tokens.length || (text === "" ? 0 : 1);
    if (usage) this.#counted = usage.completion_tokens;
    this.#held.push(...tokens);
    // Tokens whose text is not certain yet wait for the one that makes it so.
    if (this.#held.length > 0 && (text !== "" || finish)) {
      const made = piece(text, this.#held, finish === "stop");
      if (!this.#coloured) made.tabIndex = 0;
      this.#coloured = true;
      this.#held = [];
      this.#body.append(made);
    } else if (text !== "") {
      this.#body.append(text);
    }
  }

  #think(text) {
    let thoughts = this.element.querySelector("details.thoughts");
    if (!thoughts) {
      thoughts = element("details", "thoughts");
      thoughts.append(element("summary", "", "Thoughts"), element("div", "text"));
      this.#body.before(thoughts);
    }
    thoughts.lastElementChild.append(text);
  }

  /** Ends the answer. `how` is a finish reason, or "stopped". Returns what happened in a sentence. */
  end(how, retry) {
    this.element.setAttribute("aria-busy", "false");
    const now = performance.now();
    const facts = [plural(this.#counted, "token")];
    if (this.#first !== null) {
      const secs = (now - this.#first) / 1000;
      if (this.#counted > 1 && secs > 0) facts.push(`${rate((this.#counted - 1) / secs)} tokens/s`);
      facts.push(`first after ${duration((this.#first - this.#started) / 1000)}`);
    }
    if (how) facts.push(how === "stopped" ? "stopped" : (ENDS[how] ?? how));
    this.#meta.replaceChildren(...facts.map((fact) => element("span", "", fact)));
    if (this.text) this.#meta.append(this.#copy());
    if (retry) this.#meta.append(button("Again", retry));
    if (this.#coloured) this.#meta.append(scale());
    return `Answer ${how === "stopped" ? "stopped" : "complete"}: ${facts[0]}`;
  }

  /** Ends it with what went wrong. */
  fail(error, retry) {
    this.end(null, retry);
    if (this.text === "") this.#body.remove();
    const failure = element("div", "failure");
    failure.setAttribute("role", "alert");
    const what = error.status ? `${error.type || "Error"} (${error.status})` : "No answer";
    failure.append(element("strong", "", what), error.message);
    this.#meta.before(failure);
    if (this.text === "") this.#meta.firstElementChild.remove();
  }

  #copy() {
    const copy = button("Copy", async () => {
      try {
        await navigator.clipboard.writeText(this.text);
        copy.textContent = "Copied";
      } catch {
        // Pages that did not come over HTTPS may not write to the clipboard: the text is selected instead.
        getSelection().selectAllChildren(this.#body);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    return copy;
  }
}
