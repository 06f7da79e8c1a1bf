"use strict";

const at = (id) => document.getElementById(id);
const over = (job) => job.status === "completed" || job.status === "failed";
let shown = null; // The id of the job on the screen.
let following = null; // Ends the stream of its events.
let address = null; // Of the video on the screen, where it had to be fetched.

// ---- the server ----------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askForKey();
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    at("key").value = "";
    at("key-dialog").showModal();
    at("key-dialog").addEventListener("close", () => {
      sessionStorage.setItem("key", at("key").value);
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

async function* events(id, signal) {
  const answer = await ask(`v1/videos/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

async function look() {
  let words = "not reachable", kind = "trouble";
  try {
    const found = await (await fetch("health")).json();
    kind = found.ready ? "ready" : found.status === "loading" ? "" : "trouble";
    words = found.ready ? (found.busy ? `working${found.queued ? `, ${found.queued} waiting` : ""}` : "ready") : found.status;
    words += ` · ${found.ranks} rank${found.ranks === 1 ? "" : "s"}`;
    if (found.ready && !at("model").textContent) await learn();
  } catch { /* The next look may succeed. */ }
  at("health").className = kind;
  at("health-text").textContent = words;
}

async function learn() {
  const model = (await (await ask("v1/models")).json()).data[0];
  at("model").textContent = model.id;
  at("image-field").hidden = model.task !== "image-to-video";
  for (const name of ["width", "height"]) at(name).min = at(name).step = model.size_multiple;
  at("num_frames").step = model.frame_period || 1;
  at("num_frames").max = model.limits.frames;
  at("num_inference_steps").max = model.limits.steps;
}

// ---- the form ------------------------------------------------------------------------------------------------------

function preview() {
  const file = at("image").files[0];
  at("preview").hidden = !file;
  at("drop-text").hidden = Boolean(file);
  if (!file) return;
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(file);
  at("preview").alt = `Image: ${file.name}`;
}

async function submit(event) {
  event.preventDefault();
  at("problem").textContent = "";
  const form = new FormData(at("form"));
  for (const [name, value] of [...form]) if (value === "" || value.size === 0) form.delete(name);
  at("submit").disabled = true;
  try {
    const job = await (await ask("v1/videos", { method: "POST", body: form })).json();
    show(job);
    at("stage").scrollIntoView({ block: "nearest" }); // On a phone it is below the form.
    await list();
  } catch (error) {
    at("problem").textContent = error.message;
  } finally {
    at("submit").disabled = false;
  }
}

// ---- the screen ----------------------------------------------------------------------------------------------------

function show(job) {
  shown = job.id;
  following?.abort();
  draw(job);
  if (!over(job)) follow(job.id);
}

async function follow(id) {
  const ending = (following = new AbortController());
  while (!ending.signal.aborted) {
    try {
      for await (const job of events(id, ending.signal)) {
        if (shown !== id) return;
        if (job.deleted) return clear();
        draw(job);
        if (over(job)) return list();
      }
    } catch { /* The server may be starting again: the job is still there then. */ }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function draw(job) {
  at("empty").hidden = true;
  at("running").hidden = over(job);
  at("caption").hidden = false;
  at("caption-prompt").textContent = job.prompt;
  at("facts").textContent = facts(job);
  at("download").hidden = job.status !== "completed";
  at("video").hidden = job.status !== "completed";
  if (job.status === "completed") return play(job);
  at("video").removeAttribute("src");
  at("percent").textContent = `${job.progress} %`;
  at("progress").value = job.progress;
  at("state").textContent = state(job);
  if (job.status === "failed") {
    at("empty").hidden = false;
    at("empty").textContent = `Failed: ${job.error.message}`;
  }
}

function state(job) {
  if (job.status === "queued") return job.jobs_ahead ? `waiting, ${job.jobs_ahead} before it` : "waiting";
  return job.progress === 0 ? "reading the image and the prompt" : job.progress < 95 ? "denoising" : "decoding";
}

function facts(job) {
  const seconds = Object.values(job.timings ?? {}).reduce((sum, each) => sum + each, 0);
  return [
    job.size.replace("x", "×"),
    job.num_frames && `${job.num_frames} frames`,
    job.settings.num_inference_steps && `${job.settings.num_inference_steps} steps`,
    job.seed !== null && `seed ${job.seed}`,
    job.timings && `made in ${seconds.toFixed(1)} s`,
  ].filter(Boolean).join(" · ");
}

async function play(job) {
  const path = `v1/videos/${job.id}/content`;
  if (address) URL.revokeObjectURL(address);
  address = null;
  let source = path;
  if (sessionStorage.getItem("key")) { // A video element can't show a key.
    const content = await (await ask(path)).blob();
    if (shown !== job.id) return;
    source = address = URL.createObjectURL(content);
  }
  at("video").src = at("download").href = source;
  at("download").download = `${job.id}.mp4`;
  at("video").play().catch(() => { /* Playing by itself may be switched off: there are controls. */ });
}

function clear() {
  shown = null;
  following?.abort();
  for (const id of ["video", "running", "caption"]) at(id).hidden = true;
  at("video").removeAttribute("src");
  at("empty").hidden = false;
  at("empty").textContent = "Your video will play here.";
  list();
}

// ---- the history ---------------------------------------------------------------------------------------------------

async function list() {
  const jobs = (await (await ask("v1/videos?limit=50")).json()).data;
  at("history-title").hidden = !jobs.length;
  at("history").replaceChildren(...jobs.map(entry));
}

function entry(job) {
  const item = at("entry").content.firstElementChild.cloneNode(true);
  const when = new Date(job.created_at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  item.className = job.status;
  item.querySelector(".words").textContent = job.prompt;
  item.querySelector(".note").textContent = job.status === "completed" ? when : job.status.replace("_", " ");
  item.querySelector(".show").setAttribute("aria-current", job.id === shown);
  item.querySelector(".show").addEventListener("click", async () => {
    show(await (await ask(`v1/videos/${job.id}`)).json());
    list();
  });
  item.querySelector(".remove").addEventListener("click", () => remove(job.id));
  return item;
}

async function remove(id) {
  await ask(`v1/videos/${id}`, { method: "DELETE" }).catch(() => { /* It is gone already. */ });
  if (shown === id) clear();
  else list();
}

// ---- beginning -----------------------------------------------------------------------------------------------------

at("form").addEventListener("submit", submit);
at("image").addEventListener("change", preview);
at("cancel").addEventListener("click", () => remove(shown));
for (const name of ["dragenter", "dragover"]) {
  at("drop").addEventListener(name, (event) => { event.preventDefault(); at("drop").classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) {
  at("drop").addEventListener(name, (event) => { event.preventDefault(); at("drop").classList.remove("over"); });
}
at("drop").addEventListener("drop", (event) => {
  at("image").files = event.dataTransfer.files;
  preview();
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => event.preventDefault());
look();
setInterval(look, 3000);
list().catch((error) => { at("problem").textContent = error.message; });
