// The page of `adalink serve`: an image, the adapters that are asked about it, and what each of them says, with the time it took.
// It uses the same API that programs use. Each question is asked of the image alone: adapters do not read earlier answers.

const at = (id) => document.getElementById(id);
const made = (id) => at(id).content.firstElementChild.cloneNode(true);
// shown: the turn of captions; latest: that of the last question about this image
const state = { models: [], image: null, fileId: null, asked: 0, shown: null, latest: null };

class Told extends Error {
  constructor(error, status) {
    super(error?.message ?? `the server answered ${status}`);
    this.code = error?.code;
    this.status = status;
  }
}

async function api(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Told({ message: "the server cannot be reached" }, 0);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    at("access").hidden = response.status !== 401;
    throw new Told(body.error, response.status);
  }
  return response;
}

// The models

async function showModels() {
  let listed;
  try {
    listed = await (await api("v1/models")).json();
  } catch (error) {
    at("summary").textContent = error.status === 401 ? "This server wants a key." : error.message;
    return;
  }
  state.models = listed.data.map((model) => ({ id: model.id, ...model.adalink }));
  const adapters = state.models.filter((model) => !model.is_base);
  at("summary").textContent = `${adapters.length} ${adapters.length === 1 ? "adapter" : "adapters"} on one frozen model, side by side.`;
  at("models").replaceChildren(
    ...state.models.map((model) => {
      const label = made("model");
      label.title = model.asks ? "" : `It takes no question: ${why(model)}.`;
      const box = label.querySelector("input");
      box.value = model.id;
      box.checked = !model.is_base;
      label.querySelector(".name").textContent = model.is_base ? "no adapter" : model.id;
      label.querySelector(".task").textContent = model.is_base ? "the frozen model, blind" : model.asks ? "answers" : "captions";
      return label;
    }),
  );
  update();
}

const chosen = () => {
  const names = new Set([...at("models").querySelectorAll(":checked")].map((box) => box.value));
  return state.models.filter((model) => names.has(model.id));
};

const called = (model) => (model.is_base ? "the frozen model" : model.id);
const why = (model) => `its template, "${model.prompt}", has no place for one`;

function update() {
  const answers = chosen().filter((model) => model.asks);
  const silent = chosen().filter((model) => !model.asks);
  at("cannot").textContent = silent.map((model) => `${called(model)} takes no question: ${why(model)}.`).join(" ");
  const ready = Boolean(state.image) && answers.length > 0;
  at("question").disabled = at("send").disabled = !ready;
  at("hint").textContent = !state.image
    ? "Give an image first."
    : answers.length === 0
      ? "None of the chosen adapters answers questions."
      : `Asked of ${answers.map(called).join(", ")}. Each question is read alone, without the earlier ones.`;
}

// The image

async function take(file) {
  if (!file) return;
  URL.revokeObjectURL(at("image").src);
  state.image = file;
  state.fileId = state.shown = state.latest = null;
  const asked = ++state.asked;
  at("image").src = URL.createObjectURL(file);
  at("image").alt = `The image ${file.name}`;
  at("image").hidden = false;
  at("invitation").hidden = true;
  at("drop").classList.add("full");
  at("turns").replaceChildren();
  try {
    await upload();
  } catch (error) {
    if (asked !== state.asked) return;
    state.image = null;
    update();
    at("hint").textContent = error.message;
    return;
  }
  if (asked !== state.asked) return;
  update();
  await catchUp();
}

// What the chosen models have not said yet: captions of the image, and answers to the last question about it.
async function catchUp() {
  if (!state.fileId) return;
  const captioning = chosen().filter((model) => !model.asks);
  if (captioning.length) state.shown ??= turn("What it shows", "");
  await Promise.all([
    state.shown && fill(state.shown, captioning),
    state.latest && fill(state.latest, chosen().filter((model) => model.asks)),
  ]);
}

async function upload() {
  const form = new FormData();
  form.append("purpose", "vision");
  form.append("file", state.image);
  const image = state.image;
  const { id } = await (await api("v1/files", { method: "POST", body: form })).json();
  if (image === state.image) state.fileId = id;
}

// Questions and answers

function turn(title, question) {
  const article = made("turn");
  article.querySelector("h2").textContent = title;
  at("turns").prepend(article);
  return { article, question, asked: new Set() };
}

// Cards of the models that are not in a turn yet.
async function fill({ article, question, asked }, models) {
  const fresh = models.filter((model) => !asked.has(model.id));
  const cards = fresh.map((model) => {
    asked.add(model.id);
    const card = made("answer");
    card.querySelector("h3").textContent = model.is_base ? "no adapter" : model.id;
    card.querySelector(".said").textContent = "…";
    card.querySelector(".said").classList.add("waits");
    article.querySelector(".answers").append(card);
    return card;
  });
  await Promise.all(fresh.map((model, i) => answer(cards[i], model, question)));
}

// The adapters that a router chose, with their weights where there are several.
function servedBy(routed) {
  if (!routed) return "";
  const names = Object.keys(routed);
  return `, by ${names.length > 1 ? names.map((name) => `${name} ${routed[name].toFixed(2)}`).join(" and ") : (names[0] ?? "no adapter")}`;
}

async function answer(card, model, question) {
  const said = card.querySelector(".said");
  const started = performance.now();
  const passed = () => `${((performance.now() - started) / 1000).toFixed(2)} s`;
  let text = "";
  try {
    for await (const chunk of chunks(model, question)) {
      if (chunk.error) throw new Told(chunk.error, 500);
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) {
        text += piece;
        said.textContent = text;
        said.classList.remove("waits");
      }
      if (chunk.adalink) {
        const others = chunk.adalink.batch_rows - 1;
        const by = servedBy(chunk.adalink.routed);
        card.querySelector(".time").textContent = `${passed()}${by}${others ? `, with ${others} ${others === 1 ? "other" : "others"} in its batch` : ""}`;
      }
    }
    if (!text) {
      said.textContent = "it wrote nothing";
      said.classList.add("nothing");
    }
  } catch (error) {
    said.textContent = error.message;
    said.classList.add("wrong");
    card.querySelector(".time").textContent = passed();
  }
  said.classList.remove("waits");
  card.dataset.done = "true";
}

async function* chunks(model, question) {
  const response = await chat(model, question).catch(async (error) => {
    if (error.code !== "file_not_found") throw error;
    await upload(); // newer uploads took its room
    return chat(model, question);
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function chat(model, question) {
  const content = [{ type: "file", file: { file_id: state.fileId } }];
  if (question) content.push({ type: "text", text: question });
  const body = JSON.stringify({ model: model.id, stream: true, messages: [{ role: "user", content }] });
  return api("v1/chat/completions", { method: "POST", body, headers: { "Content-Type": "application/json" } });
}

// What a person does

at("file").addEventListener("change", (event) => take(event.target.files[0]));
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget ?? at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take([...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"))));
at("models").addEventListener("change", () => {
  update();
  catchUp();
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question) return;
  at("question").value = "";
  state.latest = turn(question, question);
  catchUp();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  at("access").hidden = true;
  showModels();
});
showModels();
