// Numbers for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 139460608 is "133 MiB". */
export function bytes(count) {
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit + 1 < UNITS.length) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

/** Seconds: 0.0834 is "83 ms". */
export function duration(secs) {
  if (secs === null || !Number.isFinite(secs)) return "–";
  if (secs < 0.01) return `${(secs * 1000).toFixed(1)} ms`;
  if (secs < 1) return `${Math.round(secs * 1000)} ms`;
  return secs < 100 ? `${secs.toFixed(1)} s` : `${Math.round(secs)} s`;
}

/** A rate: one digit behind the point below 100. */
export const rate = (value) => (value >= 100 || value === 0 ? Math.round(value).toLocaleString("en") : value.toFixed(1));

/** 0.123 is "12.3 %". */
export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value >= 99.95 || value === 0 ? Math.round(value) : value.toFixed(1)} %`;
}

/** A token's text with its white space visible. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll(" ", "·") || "∅";

/** "1 token", "2 tokens". */
export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
