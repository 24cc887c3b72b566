// The profile being made: a factor for every feature with a slider. Parts of the page subscribe.

const changes = new Map(); // feature -> {factor, label, weight, more: {add, clamp} of a file}
const listeners = [];
let gate = null; // of a file: when the changes apply

export const LOW = -2, HIGH = 3;

export const entries = () => [...changes];
export const factor = (feature) => changes.get(feature)?.factor ?? 1;
export const has = (feature) => changes.has(feature);
export const subscribe = (listener) => listeners.push(listener);

/** Whether factors say all of it. */
export const linear = () => !gate && entries().every(([, { more }]) => !Object.keys(more).length);

/** `kind`: "list" when sliders come or go, "factor" when one moves. */
const changed = (kind) => listeners.forEach((listener) => listener(kind));

export function add(feature, label, weight) {
  if (!changes.has(feature)) {
    changes.set(feature, { factor: 1, label, weight, more: {} });
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
  gate = null;
  changed("list");
}

/** Takes the place of what there is: a profile file's mapping, labels and weights in `known`. */
export function load({ features = [], when = null }, known) {
  clear(); // its sliders go, or those of features that stay would keep their ranges
  gate = when;
  for (const { feature, ablate, multiply = 1, ...more } of features) {
    changes.set(feature, { factor: ablate ? 0 : multiply, more, ...known[feature] });
  }
  changed("list");
}

/** What the server reads: the mapping of a YAML profile, without features that are as they were. */
export function fields(name = "") {
  const features = entries()
    .filter(([, { factor, more }]) => factor !== 1 || Object.keys(more).length)
    .map(([feature, { factor, more }]) =>
      factor === 0 && !Object.keys(more).length
        ? { feature, ablate: true } : { feature, multiply: factor, ...more });
  return { ...(name && { name }), features, ...(gate && { when: gate }) };
}
