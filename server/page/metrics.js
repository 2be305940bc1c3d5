// Prometheus' text format, as far as this server writes it, and what is read from two moments of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

function number(text) {
  return text === "+Inf" ? Infinity : Number(text);
}

/** A scrape: for each name a list of { labels, value }. */
export class Scrape {
  #samples = new Map();

  constructor(text) {
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : LINE.exec(line);
      if (!match) continue;
      const labels = {};
      for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
        labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
      }
      if (!this.#samples.has(match[1])) this.#samples.set(match[1], []);
      this.#samples.get(match[1]).push({ labels, value: number(match[3]) });
    }
  }

  /** All samples of a name. */
  all(name) {
    return this.#samples.get(name) ?? [];
  }

  /** The value of a name that has one, 0 without. */
  value(name) {
    return this.all(name)[0]?.value ?? 0;
  }

  /** Values of a gauge by one of its labels. */
  by(name, label) {
    return new Map(this.all(name).map(({ labels, value }) => [labels[label], value]));
  }

  /** Observations of a histogram up to each bound, in the order of the bounds. */
  buckets(name) {
    return this.all(`${name}_bucket`)
      .map(({ labels, value }) => ({ bound: number(labels.le), count: value }))
      .sort((a, b) => a.bound - b.bound);
  }
}

/**
 * Quantiles of what a histogram observed between two scrapes (`before` may be null: since the start), interpolated
 * within a bucket as Prometheus does. Null without observations.
 */
export function quantiles(now, before, name, shares) {
  const earlier = new Map((before?.buckets(name) ?? []).map(({ bound, count }) => [bound, count]));
  const buckets = now.buckets(name).map(({ bound, count }) => ({ bound, count: count - (earlier.get(bound) ?? 0) }));
  const total = buckets.at(-1)?.count ?? 0;
  if (total <= 0) return { total: 0, values: shares.map(() => null) };
  const values = shares.map((share) => {
    const rank = share * total;
    const index = buckets.findIndex(({ count }) => count >= rank);
    const { bound, count } = buckets[index];
    const below = buckets[index - 1] ?? { bound: 0, count: 0 };
    if (bound === Infinity) return below.bound;
    return below.bound + ((bound - below.bound) * (rank - below.count)) / Math.max(1e-12, count - below.count);
  });
  return { total, values };
}
