// Profiles as files: saved in the server's folder, loaded from it, downloaded.

import { $, h, tell } from "./dom.js";
import { get, post } from "./api.js";
import * as profile from "./profile.js";

export function start(about, first) {
  $("save-there").disabled = !about.saves;
  if (!about.saves) $("save-there").title = "The server was started without --profiles";
  list(first.profiles);
  $("save").addEventListener("submit", (event) => { event.preventDefault(); told(save); });
  $("load").addEventListener("submit", (event) => { event.preventDefault(); told(load); });
  $("download").addEventListener("click", () => { if ($("profile-name").reportValidity()) told(download); });
}

const fields = () => profile.fields($("profile-name").value);

/** Runs an action and tells what it says, or why it failed. */
async function told(action) {
  try {
    tell($("save-status"), await action());
  } catch (error) {
    tell($("save-status"), error.message, true);
  }
}

function list(names, chosen = names[0]) {
  $("load").hidden = !names.length;
  $("saved").replaceChildren(...names.map((name) =>
    h("option", { value: name, selected: name === chosen }, name)));
}

async function save() {
  const { name } = await saved({ profile: fields() });
  list((await get("/api/profiles")).profiles, name);
  return `Saved as ${name}.`;
}

async function saved(body) {
  try {
    return await post("/api/profiles", body);
  } catch (error) {
    if (error.status !== 409 || !confirm(`${error.message}. Replace it?`)) throw error;
    return post("/api/profiles", { ...body, overwrite: true });
  }
}

async function load() {
  const { file, profile: found, known } =
    await get(`/api/profiles/${encodeURIComponent($("saved").value)}`);
  profile.load(found, known);
  $("profile-name").value = found.name ?? file.replace(/\.ya?ml$/, "");
  return `${file} loaded: ${Object.keys(known).length} features${found.when ? ", behind a gate" : ""}.`;
}

async function download() {
  const { name, text } = await post("/api/yaml", { profile: fields() });
  const url = URL.createObjectURL(new Blob([text], { type: "application/yaml" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  return `${name} downloaded.`;
}
