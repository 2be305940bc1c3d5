// The playground: a chat or a completion, streamed, stopped, asked again.

import { stream } from "./api.js";
import { chat, completion, describe, parameters } from "./requests.js";
import { Answer, question } from "./turn.js";
import { watch } from "./tokens.js";

const KINDS = {
  chat: {
    label: "Message",
    placeholder: "Ask something",
    send: "Send",
    title: "Ask the model something",
    text: "The conversation stays in this tab.",
    examples: ["What is gravity?", "Write a short poem about the sea.", "Explain floating point to a ten-year-old."],
  },
  completion: {
    label: "Prompt",
    placeholder: "A text for the model to continue",
    send: "Continue",
    title: "Begin a text",
    text: "The model goes on where it ends.",
    examples: ["Once upon a time", "Returns the number of elements in", "The three laws of thermodynamics are"],
  },
};

const $ = (id) => document.getElementById(id);

export class Playground {
  kind = "chat";
  #turns = { chat: [], completion: [] };
  #running = null;
  /** Asks for a key; called when the server refuses to answer without one. Resolves to whether there is a new one. */
  #needKey;

  constructor(needKey) {
    this.#needKey = needKey;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    $("prompt").addEventListener("keydown", (event) => {
      // While a word is being composed (isComposing), Enter picks a candidate.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.kind !== "chat") return;
      event.preventDefault();
      this.#submit();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#submit();
    });
    $("stop").addEventListener("click", () => this.#running?.abort());
    $("clear").addEventListener("click", () => this.#clear());
    $("fields").addEventListener("input", () => this.#summarize());
    $("fields").addEventListener("reset", () => setTimeout(() => this.#summarize()));
    $("fields").addEventListener("submit", (event) => event.preventDefault());
    watch($("turns"), $("popover"));
    this.#summarize();
    this.show("chat");
  }

  /** Switches to a kind of request. */
  show(kind) {
    this.kind = kind;
    const words = KINDS[kind];
    $("prompt-label").textContent = words.label;
    $("prompt").placeholder = words.placeholder;
    $("send").textContent = words.send;
    $("empty-title").textContent = words.title;
    $("empty-text").textContent = words.text;
    $("keys").hidden = kind !== "chat";
    for (const field of document.querySelectorAll("[data-kind]")) field.hidden = field.dataset.kind !== kind;
    $("examples").replaceChildren(
      ...words.examples.map((text) => {
        const example = document.createElement("button");
        Object.assign(example, { type: "button", className: "quiet", textContent: text });
        example.addEventListener("click", () => {
          $("prompt").value = text;
          this.#submit();
        });
        return example;
      }),
    );
    this.#draw();
    this.#summarize();
  }

  #draw() {
    const turns = this.#turns[this.kind];
    $("empty").hidden = turns.length > 0;
    $("turns").replaceChildren(...turns.map((turn) => turn.element));
    $("clear").disabled = turns.length === 0 || this.#running !== null;
    this.#follow(true);
  }

  #clear() {
    this.#turns[this.kind] = [];
    this.#draw();
    $("prompt").focus();
  }

  #summarize() {
    const said = parameters($("fields"));
    if (this.kind !== "chat") said.system = "";
    $("parameters-summary").textContent = describe(said);
  }

  #submit() {
    const text = $("prompt").value;
    if (this.#running || text.trim() === "") return;
    if (!$("fields").checkValidity()) {
      $("parameters").open = true;
      $("fields").reportValidity();
      return;
    }
    $("prompt").value = "";
    const kind = this.kind === "chat" ? "user" : "prompt";
    this.#turns[this.kind].push({ role: "user", content: text, element: question(kind, text) });
    this.#answer();
  }

  /** Asks for an answer to the last question. */
  async #answer() {
    const kind = this.kind;
    const turns = this.#turns[kind];
    const said = parameters($("fields"));
    // Answers that failed are not part of the conversation.
    const asked = turns.filter((turn) => turn.role === "user" || turn.content !== "");
    const { path, body, read } =
      kind === "chat" ? chat(asked, said) : completion(turns.at(-1).content, { ...said, system: "" });
    const answer = new Answer(kind);
    const turn = { role: "assistant", content: "", element: answer.element };
    turns.push(turn);
    const again = () => {
      if (this.#running || this.kind !== kind) return;
      turns.splice(turns.indexOf(turn), turns.length);
      this.#answer();
    };
    this.#running = new AbortController();
    this.#busy(true);
    this.#draw();
    let finish = null;
    try {
      for await (const chunk of stream(path, body, this.#running.signal)) {
        const part = read(chunk);
        finish = part.finish ?? finish;
        answer.add(part);
        this.#follow(false);
      }
      $("announcer").textContent = answer.end(finish, again);
    } catch (error) {
      if (error.name === "AbortError") $("announcer").textContent = answer.end("stopped", again);
      else answer.fail(error, again);
      if (error.status === 401) this.#needKey().then((given) => given && again());
    } finally {
      turn.content = answer.text;
      this.#running = null;
      this.#busy(false);
      this.#follow(false);
    }
  }

  #busy(busy) {
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    $("clear").disabled = busy || this.#turns[this.kind].length === 0;
    for (const tab of document.querySelectorAll("[role=tab][data-kind-of]")) {
      tab.disabled = tab.dataset.missing === "true" || (busy && tab.dataset.kindOf !== this.kind);
    }
    // The focus would be lost with the button that had it.
    if (document.activeElement === document.body) (busy ? $("stop") : $("prompt")).focus();
  }

  /** Keeps the end in sight, unless the reader has scrolled away from it. */
  #follow(always) {
    const box = $("exchange");
    const distance = box.scrollHeight - box.scrollTop - box.clientHeight;
    if (always || distance < 120) box.scrollTop = box.scrollHeight;
  }
}
