"use strict";

const at = (id) => document.getElementById(id);
const once = (target, name) => new Promise((resolve) => { target.addEventListener(name, resolve, { once: true }); });
const over = (job) => job.status === "completed" || job.status === "failed";
let shown = null; // The id of the job on the screen.
let following = null; // Ends the stream of its events.
let address = null; // Of the video on the screen.
let watching = null; // The id of the job that plays while it is made.
let declined = false; // Whether the user has left the question for the key.

// ---- the server ----------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askForKey(Boolean(key));
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    const problem = new Error(body?.error?.message ?? `${answer.status} ${answer.statusText}`);
    throw Object.assign(problem, { status: answer.status });
  }
  return answer;
}

// What is pressed in a dialog; nothing when it is left by Escape. One at a time: a dialog is shut before it tells so,
// and one that opened in between would take the end of the last one for its own.
let answered = Promise.resolve();
function pressed(id) {
  answered = answered.then(() => {
    at(id).returnValue = "";
    at(id).showModal();
    return once(at(id), "close");
  }).then(() => at(id).returnValue);
  return answered;
}

let asking = null;
function askForKey(wrong) {
  asking ??= (async () => {
    at("key").value = "";
    at("key-problem").textContent = wrong ? "That key is not the right one." : "";
    const answer = await pressed("key-dialog");
    asking = null;
    declined = !answer;
    if (declined) throw new Error("This server wants a key: reload the page to give it.");
    sessionStorage.setItem("key", at("key").value);
  })();
  return asking;
}

// An address for what is only shown to who has the key, for elements that can't show it.
async function addressOf(path) {
  if (!sessionStorage.getItem("key")) return path;
  return URL.createObjectURL(await (await ask(path)).blob());
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
    if (found.ready && !at("model").textContent && !declined) await learn();
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

function say(problem) {
  at("problem").textContent = problem;
  if (problem) at("problem").scrollIntoView({ block: "nearest" });
}

// ---- the form ------------------------------------------------------------------------------------------------------

async function preview() {
  const file = at("image").files[0];
  at("preview").hidden = !file;
  at("drop-text").hidden = Boolean(file);
  URL.revokeObjectURL(at("preview").src);
  if (!file) return at("preview").removeAttribute("src");
  say("");
  at("preview").src = URL.createObjectURL(file);
  at("preview").alt = `Image: ${file.name}`;
  try {
    (await createImageBitmap(file)).close();
  } catch {
    if (at("image").files[0] !== file) return;
    at("image").value = "";
    preview();
    say(`${file.name} is no image that can be read: choose a PNG, JPEG or WebP.`);
  }
}

async function useAgain() {
  const job = await (await ask(`v1/videos/${shown}`)).json();
  for (const field of at("form").elements) {
    if (field.type !== "file" && field.name) field.value = job.settings[field.name] ?? "";
  }
  at("seed").value = job.seed ?? "";
  if (at("negative_prompt").value || at("guidance_scale").value || at("flow_shift").value) at("more").open = true;
  if (!at("image-field").hidden) {
    const image = await (await ask(`v1/videos/${job.id}/content?variant=input_reference`)).blob();
    const files = new DataTransfer();
    files.items.add(new File([image], "the image of that video"));
    at("image").files = files.files;
    preview();
  }
  say("");
  at("prompt").focus();
}

async function submit(event) {
  event.preventDefault();
  say("");
  const form = new FormData(at("form"));
  for (const [name, value] of [...form]) if (value === "" || value.size === 0) form.delete(name);
  at("submit").disabled = true;
  try {
    const job = await (await ask("v1/videos", { method: "POST", body: form })).json();
    show(job);
    at("stage").scrollIntoView({ block: "nearest" }); // On a phone it is below the form.
    await list();
  } catch (error) {
    say(error.message);
  } finally {
    at("submit").disabled = false;
  }
}

// ---- the screen ----------------------------------------------------------------------------------------------------

function show(job) {
  shown = job.id;
  location.hash = job.id; // So that it is there after a reload.
  following?.abort();
  watching = null;
  draw(job);
  if (!over(job)) follow(job.id);
}

async function follow(id) {
  const ending = (following = new AbortController());
  while (!ending.signal.aborted) {
    try {
      for await (const job of events(id, ending.signal)) {
        if (shown !== id) return;
        if (job.deleted) { clear(); return list(); }
        draw(job);
        if (over(job)) return list();
      }
    } catch (error) {
      if (ending.signal.aborted) return; // Another job is shown by now.
      if (error.status === 404) { clear(); return list(); }
      if (declined) return; // Else the server may be starting again: the job is still there then.
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function draw(job) {
  at("empty").hidden = true;
  const plays = watching === job.id && job.status !== "failed";
  at("running").hidden = over(job);
  at("caption").hidden = false;
  at("caption-prompt").textContent = job.prompt;
  at("facts").textContent = facts(job);
  at("download").hidden = job.status !== "completed";
  at("video").hidden = job.status !== "completed" && !plays;
  if (job.status === "completed") return play(job, plays);
  if (!plays) unload();
  if (!plays && job.status === "in_progress" && job.frames_ready) watch(job.id);
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

async function play(job, goesOn = false) {
  if (address) URL.revokeObjectURL(address);
  const source = await addressOf(`v1/videos/${job.id}/content`);
  if (shown !== job.id) return;
  address = source;
  at("download").href = source;
  at("download").download = `${job.id}.mp4`;
  if (!goesOn) begin(source);
}

function begin(source) {
  at("video").src = source;
  at("video").hidden = false;
  at("video").play().catch(() => { /* Playing by itself may be switched off: there are controls. */ });
}

// Plays a video while its later frames are decoded.
async function watch(id) {
  watching = id;
  try {
    const answer = await ask(`v1/videos/${id}/stream`, { signal: following.signal });
    const kind = answer.headers.get("content-type"), source = new MediaSource();
    if (!MediaSource.isTypeSupported(kind)) return await answer.body.cancel(); // The finished file may do.
    begin(URL.createObjectURL(source));
    await once(source, "sourceopen");
    const buffer = source.addSourceBuffer(kind), reader = answer.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      buffer.appendBuffer(part.value);
      await once(buffer, "updateend");
    }
    source.endOfStream();
  } catch {
    if (watching === id) watching = null; // What follows is the finished file.
  }
}

function clear() {
  shown = null;
  history.replaceState(null, "", " ");
  following?.abort();
  for (const id of ["video", "running", "caption"]) at(id).hidden = true;
  unload();
  at("empty").hidden = false;
  at("empty").textContent = "Your video will play here.";
}

// Without the second step it would go on loading and playing, unseen.
function unload() {
  if (!at("video").hasAttribute("src")) return;
  at("video").removeAttribute("src");
  at("video").load();
}

// ---- the history ---------------------------------------------------------------------------------------------------

const PAGE = 50; // Jobs that one answer lists.
let wanted = PAGE; // How many the history shows, if there are so many.
let listing = null; // The last question for it: what was asked before may be answered later.

async function list() {
  const jobs = [], turn = (listing = {});
  let found;
  do {
    const after = jobs.length ? `&after=${jobs.at(-1).id}` : "";
    found = await (await ask(`v1/videos?limit=${PAGE}${after}`)).json();
    jobs.push(...found.data);
  } while (found.has_more && jobs.length < wanted);
  if (turn !== listing) return;
  at("history-title").hidden = !jobs.length;
  at("older").hidden = !found.has_more;
  at("history").replaceChildren(...jobs.map(entry));
}

const thumbnails = new Map(); // Addresses, by job.

function entry(job) {
  const item = at("entry").content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(`.${name}`);
  const when = new Date(job.created_at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  item.className = job.status;
  part("words").textContent = job.prompt;
  part("note").textContent = job.status === "completed" ? when : `${job.status.replace("_", " ")} · ${when}`;
  part("show").href = `#${job.id}`;
  part("show").setAttribute("aria-current", job.id === shown);
  part("remove").addEventListener("click", () => remove(job));
  part("thumb").addEventListener("load", () => { part("thumb").hidden = false; });
  if (job.status === "completed") thumbnail(job.id).then((source) => { part("thumb").src = source; }, () => {});
  return item;
}

function thumbnail(id) {
  if (!thumbnails.has(id)) thumbnails.set(id, addressOf(`v1/videos/${id}/content?variant=thumbnail`));
  return thumbnails.get(id);
}

async function openAddress() {
  const id = location.hash.slice(1);
  if (!id || id === shown) return;
  try {
    show(await (await ask(`v1/videos/${encodeURIComponent(id)}`)).json());
  } catch (error) {
    clear();
    at("empty").textContent = error.message;
  }
  await list();
}

async function remove(job) {
  const done = job.status === "completed";
  at("remove-title").textContent = done ? "Delete this video for good?" : over(job) ? "Forget this job?" : "Cancel this job?";
  at("remove-words").textContent = job.prompt;
  at("remove-yes").textContent = done ? "Delete it" : over(job) ? "Forget it" : "Cancel it";
  if (!await pressed("remove-dialog")) return;
  const seen = shown === job.id;
  if (seen) clear(); // Before it is gone: what plays and what follows it would ask for it still.
  try {
    await ask(`v1/videos/${job.id}`, { method: "DELETE" });
  } catch (error) {
    say(error.message);
    if (seen && error.status !== 404) show(job);
  }
  await list();
}

// ---- beginning -----------------------------------------------------------------------------------------------------

at("form").addEventListener("submit", submit);
at("image").addEventListener("change", preview);
at("again").addEventListener("click", () => useAgain().catch((error) => { say(error.message); }));
at("older").addEventListener("click", () => { wanted += PAGE; list().catch((error) => { say(error.message); }); });
at("video").addEventListener("error", () => {
  if (!at("video").hidden && at("video").getAttribute("src")) say("This browser can't show the video: download it.");
});
at("cancel").addEventListener("click", async () => remove(await (await ask(`v1/videos/${shown}`)).json()));
window.addEventListener("hashchange", openAddress);
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
list().then(openAddress).catch((error) => { say(error.message); });
