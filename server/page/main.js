// Puts the page together: tabs, the API key, the playground, the server's figures.

import { key, request } from "./api.js";
import { Live } from "./live.js";
import { Playground } from "./playground.js";

const $ = (id) => document.getElementById(id);

/** Asks for a key until one is accepted or the dialog is closed; resolves to whether there is one. */
function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key-button").hidden = false;
  $("key-error").hidden = true;
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let accepted = false;
    const submit = async (event) => {
      event.preventDefault();
      const before = key.get();
      key.set($("key").value);
      try {
        await request("v1/models");
        accepted = true;
        dialog.close();
      } catch (error) {
        if (before === null) key.clear();
        else key.set(before);
        $("key-error").textContent = error.status === 401 ? "The server does not know this key." : error.message;
        $("key-error").hidden = false;
        $("key").select();
      }
    };
    const cancel = () => dialog.close();
    $("key-form").addEventListener("submit", submit);
    $("key-cancel").addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      $("key-form").removeEventListener("submit", submit);
      $("key-cancel").removeEventListener("click", cancel);
      resolve(accepted);
    }, { once: true });
  });
}

const playground = new Playground(askForKey);
const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
  }
  document.body.dataset.view = tab.dataset.kindOf ? "playground" : "server";
  if (tab.dataset.kindOf) {
    $("exchange").setAttribute("aria-labelledby", tab.id);
    playground.show(tab.dataset.kindOf);
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    // A tab that is not shown at this width cannot be chosen.
    const there = tabs.filter((other) => !other.disabled && other.offsetParent !== null);
    const next = there[(there.indexOf(tab) + step + there.length) % there.length];
    choose(next);
    next.focus();
  });
}

$("key-button").addEventListener("click", askForKey);

/** A model without a chat template can only continue texts. */
async function chatIfPossible() {
  const info = await (await request("tokenizer_info")).json();
  if (info.chat_template !== undefined) return;
  const tab = $("tab-chat");
  tab.dataset.missing = "true";
  tab.disabled = true;
  tab.title = "This model has no chat template";
  if (playground.kind === "chat") choose($("tab-completion"));
}

new Live().start();
// Without an answer both tabs stay, and a request tells what is wrong.
chatIfPossible().catch(() => {});
request("v1/models").catch((error) => { $("key-button").hidden = error.status !== 401; });
