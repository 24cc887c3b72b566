// Where the page begins: what there is, then its parts.

import { $, tell } from "./dom.js";
import { get } from "./api.js";
import * as features from "./features.js";
import * as responses from "./responses.js";
import * as saved from "./saved.js";
import * as steering from "./steering.js";

try {
  const first = await get("/api/start"); // one answer with all that the first view shows
  const { about } = first;
  $("model").textContent =
    `${about.model}, ${about.n_latents} features` + (about.rows ? `, seen on ${about.rows} responses` : "");
  for (const part of [responses, steering, saved, features]) part.start(about, first);
  document.documentElement.dataset.ready = "true";
} catch (error) {
  tell($("score-status"), error.message, true);
}
