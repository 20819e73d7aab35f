// The chat page: one conversation in memory, sent whole with each question, answered as a stream of server-sent events.
//
//   form ─► ask ─► POST /v1/chat/completions ─► events ─► the answer's text, then its route and speed

const $ = (id) => document.getElementById(id);
let turns = [];
let running = null; // AbortController of the answer under way

$("key").value = localStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  localStorage.setItem("key", $("key").value);
  listModels();
});
$("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("log").replaceChildren();
  $("question").focus();
});
$("stop").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  ask(question);
});
listModels();

async function listModels() {
  try {
    const { data } = await (await call("/v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    $("settings").classList.remove("error");
  } catch (error) {
    $("settings").open = true; // a key is missing, most likely
    $("settings").classList.add("error");
    $("model").replaceChildren(new Option(error.message, ""));
  }
}

async function ask(question) {
  const conversation = turns;
  show("user", question);
  const turn = show("assistant", "");
  const answer = { text: "", started: performance.now(), first: 0, counts: null, route: [] };
  running = new AbortController();
  setBusy(turn, true);
  try {
    for await (const chunk of stream([...conversation, { role: "user", content: question }], running.signal)) {
      add(chunk, answer, turn);
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(turn, error.message);
  } finally {
    running = null;
    setBusy(turn, false);
  }
  if (answer.text && conversation === turns) {
    turns.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  }
  tellRoute(turn, answer);
}

async function* stream(messages, signal) {
  const system = $("system").value.trim();
  const response = await call("/v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify({
      model: $("model").value,
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      temperature: number("temperature"),
      max_tokens: number("max-tokens"),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  let rest = "";
  for await (const bytes of parts(response.body.pipeThrough(new TextDecoderStream()))) {
    const events = (rest + bytes).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function* parts(readable) { // not every browser can iterate over a stream
  const reader = readable.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server says ${response.status}`);
}

function add(chunk, answer, turn) {
  if (chunk.usage) answer.counts = chunk.usage;
  if (chunk.swarm) answer.route = chunk.swarm.route;
  const text = chunk.choices[0]?.delta.content;
  if (!text) return;
  answer.first ||= performance.now();
  answer.text += text;
  turn.querySelector("p").textContent = answer.text;
  keepDown();
}

function show(role, text) {
  const turn = document.createElement("section");
  turn.className = `turn ${role}`;
  const words = document.createElement("p");
  words.textContent = text;
  turn.append(words);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

function complain(turn, message) {
  const line = document.createElement("p");
  line.className = "error";
  line.textContent = message;
  turn.append(line);
}

function tellRoute(turn, { counts, route, started, first }) {
  if (!counts || !first) return; // stopped before the end
  const seconds = (performance.now() - first) / 1000;
  const place = document.createElement("div");
  place.className = "route";
  place.append(
    `${counts.completion_tokens} tokens, first after ${((first - started) / 1000).toFixed(2)} s, ` +
      `then ${(Math.max(0, counts.completion_tokens - 1) / seconds).toFixed(1)} per second, through`,
  );
  const list = document.createElement("ol");
  for (const hop of route) {
    const item = document.createElement("li");
    const name = document.createElement("b");
    name.textContent = hop.name;
    item.title = hop.peer_id;
    item.append(name, ` blocks ${hop.blocks}`, hop.ms_per_token === null ? "" : `, ${hop.ms_per_token} ms`);
    list.append(item);
  }
  place.append(list);
  turn.append(place);
  keepDown();
}

function setBusy(turn, busy) {
  turn.classList.toggle("busy", busy);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

function keepDown() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function number(id) {
  return $(id).value === "" ? null : Number($(id).value);
}
