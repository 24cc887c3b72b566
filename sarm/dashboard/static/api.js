// Requests to the server that sent this page, and to no other.

import { $, tell } from "./dom.js";

let token = sessionStorage.getItem("sarm-token");

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const get = (path, signal) => ask(path, { signal });

export const post = (path, body, signal) =>
  ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

async function ask(path, options) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (response.status === 401) {
    await login(token ? "That is another token." : "");
    return ask(path, options);
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) {
    throw new ApiError(response.status, answer?.error?.message ?? `status ${response.status}`);
  }
  return answer;
}

let asking = null;

/** One dialog, however many requests wait for it. */
function login(problem) {
  asking ??= new Promise((done) => {
    tell($("login-status"), problem, true);
    $("login").addEventListener("close", () => {
      token = $("token").value.trim();
      $("token").value = "";
      sessionStorage.setItem("sarm-token", token);
      asking = null;
      done();
    }, { once: true });
    $("login").showModal();
  });
  return asking;
}

/** Wraps a call whose answer only matters if none was asked for later: `latest(call)(...)`. */
export function latest(call) {
  let running = null;
  return async (...values) => {
    running?.abort();
    const mine = (running = new AbortController());
    try {
      const answer = await call(...values, mine.signal);
      return mine.signal.aborted ? null : answer;
    } catch (error) {
      if (error.name === "AbortError" || mine.signal.aborted) return null;
      throw error;
    }
  };
}
