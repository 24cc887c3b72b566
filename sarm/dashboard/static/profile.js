// The profile being made: a factor for every feature with a slider. Parts of the page subscribe.

const changes = new Map(); // feature -> {factor, label, weight}
const listeners = [];

export const LOW = -2, HIGH = 3;

export const entries = () => [...changes];
export const factor = (feature) => changes.get(feature)?.factor ?? 1;
export const has = (feature) => changes.has(feature);
export const subscribe = (listener) => listeners.push(listener);

/** `kind`: "list" when sliders come or go, "factor" when one moves. */
const changed = (kind) => listeners.forEach((listener) => listener(kind));

export function add(feature, label, weight) {
  if (!changes.has(feature)) {
    changes.set(feature, { factor: 1, label, weight });
    changed("list");
  }
}

export function set(feature, value) {
  const found = changes.get(feature);
  if (found && found.factor !== value) {
    found.factor = value;
    changed("factor");
  }
}

export function remove(feature) {
  if (changes.delete(feature)) changed("list");
}

export function clear() {
  changes.clear();
  changed("list");
}

/** What the server reads: the mapping of a YAML profile, without features that are as they were. */
export function fields(name = "") {
  const features = entries()
    .filter(([, { factor }]) => factor !== 1)
    .map(([feature, { factor }]) =>
      factor === 0 ? { feature, ablate: true } : { feature, multiply: factor });
  return name ? { name, features } : { features };
}
