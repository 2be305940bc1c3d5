// Tokens as coloured text, and what else the model had in mind when one is pointed at or focused.

import { percent, visible } from "./format.js";

/** Probabilities below which a token gets the next warmer colour. */
const STEPS = [0.8, 0.5, 0.25, 0.08];

/** The tokens of each coloured piece of text: mostly one; several where a character or a stop text spans them. */
const tokensOf = new WeakMap();

const probability = (logprob) => Math.exp(logprob);

/** A piece of text made of these tokens; colour is that of the least likely one. */
export function piece(text, tokens, ends) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  if (text === "" && ends) {
    span.classList.add("mark");
    span.textContent = "■";
  }
  const known = tokens.filter((token) => token.logprob !== null);
  if (known.length > 0) {
    const least = Math.min(...known.map((token) => probability(token.logprob)));
    span.dataset.sure = STEPS.filter((step) => least < step).length;
  }
  span.tabIndex = -1;
  tokensOf.set(span, tokens);
  return span;
}

/** What the colours mean. */
export function scale() {
  const element = document.createElement("span");
  element.className = "scale";
  element.append("sure");
  for (let step = 0; step <= STEPS.length; step += 1) {
    const swatch = document.createElement("span");
    swatch.className = "token";
    swatch.dataset.sure = step;
    swatch.setAttribute("aria-hidden", "true");
    element.append(swatch);
  }
  element.append("unsure");
  return element;
}

function cell(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function row(alternative, chosen) {
  const element = document.createElement("tr");
  if (alternative.text === chosen.text) element.className = "chosen";
  const share = probability(alternative.logprob);
  const name = cell("th", "", visible(alternative.text));
  name.scope = "row";
  const track = cell("td", "", "");
  const bar = track.appendChild(cell("div", "track", "")).appendChild(cell("span", "", ""));
  bar.style.width = `${Math.min(100, share * 100)}%`;
  element.append(name, track, cell("td", "number", percent(share)));
  return element;
}

function table(token) {
  const element = document.createElement("table");
  const listed = [...token.top].sort((a, b) => b.logprob - a.logprob);
  if (token.logprob !== null && !listed.some((other) => other.text === token.text)) listed.push(token);
  element.append(...listed.map((alternative) => row(alternative, token)));
  return element;
}

/** Shows the popover for the coloured pieces inside `root`, and moves between them with the arrow keys. */
export function watch(root, popover) {
  let shown = null;

  const hide = () => {
    popover.hidden = true;
    shown?.removeAttribute("aria-describedby");
    shown = null;
  };

  const show = (span) => {
    const tokens = tokensOf.get(span);
    if (!tokens || tokens.length === 0 || span === shown) return;
    hide();
    shown = span;
    const rest = tokens.length > 3 ? [cell("p", "below", `and ${tokens.length - 3} more tokens`)] : [];
    popover.replaceChildren(...tokens.slice(0, 3).map(table), ...rest);
    popover.hidden = false;
    span.setAttribute("aria-describedby", popover.id);
    // A piece that spans lines is pointed at where it begins.
    const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = popover;
    const left = Math.max(8, Math.min(place.left, document.documentElement.clientWidth - width - 8));
    const above = place.top - height - 8;
    popover.style.left = `${left}px`;
    popover.style.top = `${above >= 8 ? above : place.bottom + 8}px`;
  };

  const pieceAt = (event) => (event.target.closest?.(".token") && tokensOf.has(event.target) ? event.target : null);
  root.addEventListener("pointerover", (event) => (pieceAt(event) ? show(event.target) : hide()));
  root.addEventListener("pointerleave", () => { if (document.activeElement !== shown) hide(); });
  root.addEventListener("focusin", (event) => (pieceAt(event) ? show(event.target) : hide()));
  root.addEventListener("focusout", hide);
  root.addEventListener("click", (event) => pieceAt(event)?.focus({ preventScroll: true }));
  addEventListener("scroll", hide, { capture: true, passive: true });

  root.addEventListener("keydown", (event) => {
    const here = pieceAt(event);
    if (!here) return;
    const pieces = [...here.parentElement.querySelectorAll(".token")];
    const index = pieces.indexOf(here);
    const target = {
      ArrowRight: pieces[index + 1],
      ArrowLeft: pieces[index - 1],
      Home: pieces[0],
      End: pieces.at(-1),
    }[event.key];
    if (event.key === "Escape") hide();
    if (!target) return;
    event.preventDefault();
    // One piece of an answer is reached with Tab; the arrows lead to the others.
    here.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  });
}
