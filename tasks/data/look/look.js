// Searches, filters, sorts and pages through the samples. Texts reach the page as text only.
const entries = JSON.parse(document.querySelector("#entries").textContent);
const form = document.querySelector("#filter"), cards = document.querySelector("#cards");
const pagers = [...document.querySelectorAll(".pages")];
const names = {problem: ["problem", "bad"], odd: ["odd", "fair"], duplicate: ["twice", "none"], val: ["in val too", "bad"]};
let found = [], page = 0;

for (const entry of entries) {
  const prose = [...entry.c, ...entry.q.map((asked) => asked[0])], lengths = prose.map((text) => text.length);
  entry.answers = new Set(entry.q.flatMap((asked) => asked[1].map((answer) => answer[0].toLowerCase())));
  entry.all = [...prose, ...entry.q.flatMap((asked) => asked[2].map((turn) => turn[1])), ...entry.answers, entry.k, entry.f, ...entry.w].join("\n").toLowerCase();
  entry.longest = Math.max(0, ...lengths);
  entry.shortest = Math.min(...lengths);  // Infinity without a text: last
  entry.pixels = entry.s[0] * entry.s[1];
  entry.shape = entry.s[1] ? entry.s[0] / entry.s[1] : NaN;
}
const orders = {
  odd: (a, b) => b.o - a.o, large: (a, b) => b.pixels - a.pixels, small: (a, b) => (a.pixels || Infinity) - (b.pixels || Infinity),
  wide: (a, b) => (b.shape || 0) - (a.shape || 0), tall: (a, b) => (a.shape || Infinity) - (b.shape || Infinity), heavy: (a, b) => b.s[2] - a.s[2],
  long: (a, b) => b.longest - a.longest, short: (a, b) => a.shortest - b.shortest,
};

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) { made.textContent = text; made.dir = "auto"; }
  return made;
}

function bytes(count) {
  return count < 1024 ? `${count} bytes` : count < 1048576 ? `${(count / 1024).toFixed(1)} KiB` : `${(count / 1048576).toFixed(1)} MiB`;
}

function card(entry) {
  const made = element("li", "card"), image = element("div", "image");
  for (const small of entry.i) {
    const img = document.createElement("img");
    img.decoding = "async";
    img.alt = `Image ${entry.k}`;
    img.src = "data:image/jpeg;base64," + small;
    image.append(img);
  }
  if (!entry.i.length || entry.r) image.append(element("p", "missing", entry.r || "no image"));
  made.append(image);
  if (entry.m.length) {
    const marks = element("p", "marks");
    for (const mark of entry.m) marks.append(element("span", "badge " + names[mark][1], names[mark][0]));
    made.append(marks);
  }
  const [width, height, size, kind] = entry.s;
  if (width) made.append(element("p", "size", `${width} × ${height} ${kind}, ${bytes(size)}${entry.x > 1 ? `, and ${entry.x - 1} more` : ""}`));
  for (const note of entry.w) made.append(element("p", "why", note));
  if (entry.c.length || entry.q.length) {
    const texts = element("ul", "texts");
    texts.tabIndex = 0;
    for (const caption of entry.c) texts.append(element("li", "", caption));
    for (const [question, answers, turns] of entry.q) {
      const asked = element("li"), given = element("ul", "answers");
      for (const [answer, count] of answers) {
        const one = element("li");
        one.append(element("bdi", "", answer));
        if (count > 1) one.append(element("span", "", ` × ${count}`));
        given.append(one);
      }
      for (const [role, text] of turns) asked.append(element("p", "turn", `${role}: ${text}`));
      asked.append(element("p", "question", question), given);
      texts.append(asked);
    }
    made.append(texts);
  }
  made.append(element("p", "key", entry.p ? `${entry.k} · ${entry.p}` : entry.k));
  return made;
}

function display() {
  const size = Number(form.elements.size.value) || Math.max(1, found.length), last = Math.max(0, Math.ceil(found.length / size) - 1);
  page = Math.min(Math.max(page, 0), last);
  cards.replaceChildren(...found.slice(page * size, (page + 1) * size).map(card));
  for (const pager of pagers) {
    pager.hidden = last === 0;
    pager.querySelector("span").textContent = `page ${page + 1} of ${last + 1}`;
    for (const button of pager.querySelectorAll("button")) button.disabled = page + Number(button.dataset.step) !== Math.min(Math.max(page + Number(button.dataset.step), 0), last);
  }
}

function apply() {
  const value = (name) => (form.elements[name] ? form.elements[name].value.trim().toLowerCase() : "");
  const mark = value("mark"), text = value("text"), answer = value("answer"), order = value("order");
  found = entries.filter((entry) => (!mark || entry.m.includes(mark)) && (!text || entry.all.includes(text)) && (!answer || entry.answers.has(answer)));
  if (order) found.sort(orders[order]);
  page = 0;
  form.querySelector("output").textContent = `${found.length.toLocaleString("en")} of ${entries.length.toLocaleString("en")} samples`;
  display();
}

form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
for (const pager of pagers)
  pager.addEventListener("click", (event) => {
    if (!event.target.dataset.step) return;
    page += Number(event.target.dataset.step);
    display();
    document.querySelector("#samples").scrollIntoView();
  });
apply();
