// What the server does now, from /metrics: throughput, latency, memory, formats.

import { request } from "./api.js";
import { draw } from "./chart.js";
import { bytes, duration, percent, plural, rate } from "./format.js";
import { quantiles, Scrape } from "./metrics.js";

const EVERY_MS = 2000;
/** Scrapes that are kept: two minutes. */
const KEPT = 60;

const PARTS = {
  weights: "MX codes",
  scales: "MX scales",
  unquantized: "unquantized",
  parameters: "parameters",
  kv_cache: "KV cache",
  workspace: "workspace",
  graphs: "graphs",
};

const LATENCIES = {
  first: "vllm:time_to_first_token_seconds",
  next: "vllm:inter_token_latency_seconds",
  whole: "vllm:e2e_request_latency_seconds",
};

const $ = (id) => document.getElementById(id);
const set = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };

export class Live {
  #history = [];
  #timer = null;

  /** Asks as long as the page is seen. */
  start() {
    const look = () => (document.hidden ? this.#rest() : this.#wake());
    document.addEventListener("visibilitychange", look);
    look();
  }

  #rest() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  #wake() {
    if (this.#timer === null) this.#poll();
  }

  async #poll() {
    const started = performance.now();
    // Set before the first answer, so that nobody starts a second round.
    this.#timer = -1;
    try {
      const response = await request("metrics", { signal: AbortSignal.timeout(5 * EVERY_MS) });
      const scrape = new Scrape(await response.text());
      this.#take({ at: performance.now(), scrape });
      await this.#health();
    } catch {
      this.#state("gone", "No connection");
    }
    if (document.hidden) this.#timer = null;
    else this.#timer = setTimeout(() => this.#poll(), Math.max(0, EVERY_MS - (performance.now() - started)));
  }

  async #health() {
    try {
      await request("health");
      const running = this.#history.at(-1).scrape.value("vllm:num_requests_running");
      this.#state(running > 0 ? "busy" : "ready", running > 0 ? "Working" : "Ready");
    } catch (error) {
      const words = error.status === 503 ? error.message : "No connection";
      this.#state(error.status === 503 ? "waiting" : "gone", words.charAt(0).toUpperCase() + words.slice(1));
    }
  }

  #state(state, text) {
    $("state").dataset.state = state;
    set("state-text", text);
  }

  #take(moment) {
    const tokens = (m) => m.scrape.value("vllm:generation_tokens_total");
    // A server that was started anew counts from 0 again.
    if (this.#history.length > 0 && tokens(moment) < tokens(this.#history.at(-1))) this.#history = [];
    this.#history.push(moment);
    if (this.#history.length > KEPT + 1) this.#history.shift();
    this.#throughput();
    this.#latency();
    this.#memory(moment.scrape);
    this.#formats(moment.scrape);
  }

  #rates(name) {
    return this.#history.slice(1).map((now, index) => {
      const before = this.#history[index];
      return (now.scrape.value(name) - before.scrape.value(name)) / ((now.at - before.at) / 1000);
    });
  }

  #throughput() {
    const { scrape } = this.#history.at(-1);
    const generated = this.#rates("vllm:generation_tokens_total");
    const prompts = this.#rates("vllm:prompt_tokens_total");
    set("tokens-rate", rate(generated.at(-1) ?? 0));
    set("prompt-rate", rate(prompts.at(-1) ?? 0));
    draw($("tokens-chart"), generated, KEPT);
    set("running", String(scrape.value("vllm:num_requests_running")));
    set("waiting", String(scrape.value("vllm:num_requests_waiting")));
    set("kv-usage", percent(scrape.value("vllm:kv_cache_usage_perc")));
  }

  #latency() {
    const now = this.#history.at(-1).scrape;
    const before = this.#history[0].scrape;
    const recent = quantiles(now, before, LATENCIES.whole, []).total > 0;
    for (const [id, name] of Object.entries(LATENCIES)) {
      const { values } = quantiles(now, recent ? before : null, name, [0.5, 0.95]);
      set(`${id}-p50`, duration(values[0]));
      set(`${id}-p95`, duration(values[1]));
    }
    const { total } = quantiles(now, recent ? before : null, LATENCIES.whole, []);
    const since = recent ? "in the last two minutes" : "since the start";
    set("latency-note", total > 0 ? `${plural(total, "sequence")} ${since}.` : "Nothing has been served yet.");
  }

  #memory(scrape) {
    const memory = scrape.by("mx_memory_bytes", "component");
    if (!memory.has("weights")) return;
    const held = (part) => memory.get(part) ?? 0;
    const ratio = scrape.value("mx_footprint_ratio");
    const bits = scrape.value("mx_weight_bits_per_parameter");
    const parameters = held("weights") + held("scales") + held("unquantized");
    set("parameters-held", bytes(parameters));
    const inBits = bits > 0 ? `, ${bits.toFixed(2)} bits per MX parameter` : "";
    const compared = ratio > 1.005 ? `${ratio.toFixed(2)} times less than BF16` : "as BF16 has them";
    set("parameters-ratio", `of parameters: ${compared}${inBits}`);
    // The bar is as long as BF16 would be: what is empty is what is saved.
    const ofModel = ["weights", "scales", "unquantized"].map((part) => [part, held(part)]);
    bar("parameters", ofModel, parameters * Math.max(1, ratio));
    const others = ["kv_cache", "workspace", "graphs"].map((part) => [part, held(part)]);
    const all = [["parameters", parameters], ...others];
    const total = all.reduce((sum, [, size]) => sum + size, 0);
    set("total-held", bytes(total));
    bar("total", all, total);
  }

  #formats(scrape) {
    const name = scrape.all("vllm:num_requests_running")[0]?.labels.model_name;
    if (name) {
      set("model", name);
      document.title = `${name} · mxserve`;
    }
    const linears = scrape.all("mx_linear_info").map(({ labels }) => labels);
    const shown = linears.map(({ layer_group, declared, executed }) => [layer_group, declared, executed].join("\n"));
    if ($("formats").dataset.shown === shown.join("\n\n")) return;
    $("formats").dataset.shown = shown.join("\n\n");
    $("formats").replaceChildren(
      ...linears.map(({ layer_group, declared, executed, kernel }) => {
        const row = document.createElement("tr");
        row.title = kernel;
        const head = row.appendChild(document.createElement("th"));
        head.scope = "row";
        head.textContent = layer_group.replaceAll("+", " + ");
        row.insertCell().textContent = declared;
        const ran = row.insertCell();
        ran.textContent = executed;
        ran.classList.toggle("differs", executed !== declared);
        return row;
      }),
    );
    const attention = scrape.all("mx_attention_info")[0]?.labels;
    const cache = attention ? ` KV cache in ${attention.kv_cache_dtype}, ${attention.bits_per_element} bits per element.` : "";
    const same = linears.every(({ declared, executed }) => declared === executed);
    set("formats-note", `${same ? "Every layer runs what its checkpoint declares." : "Some layers run another scheme than declared."}${cache}`);
  }
}

/** A bar of parts of `whole`, with its legend. */
function bar(id, parts, whole) {
  const shown = parts.filter(([, size]) => size > 0);
  const legend = $(`${id}-legend`);
  const names = shown.map(([part]) => part).join();
  if (legend.dataset.names !== names) {
    legend.dataset.names = names;
    $(`${id}-bar`).replaceChildren(...shown.map(([part]) => {
      const element = document.createElement("div");
      element.dataset.part = part;
      return element;
    }));
    legend.replaceChildren(...shown.map(([part]) => {
      const row = document.createElement("div");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.dataset.part = part;
      const term = document.createElement("dt");
      term.textContent = PARTS[part];
      row.append(swatch, term, document.createElement("dd"));
      return row;
    }));
  }
  shown.forEach(([, size], index) => {
    $(`${id}-bar`).children[index].style.width = `${(size / whole) * 100}%`;
    legend.children[index].lastElementChild.textContent = bytes(size);
  });
}
