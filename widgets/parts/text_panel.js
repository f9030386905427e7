// Tokens are laid out once; an update repaints only what changed, in the next animation frame.
const KINDS = ["unseen", "local", "anchor", "dna", "note-only"]; // CSS classes, by the code of a key
const WORDS = ["not read", "in the window", "an anchor", "in the ring of an opened gate", "in a note only"];
const TAUGHT = [null, "window", "anchor", "ring", "note"]; // the glossary's word in each of WORDS
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

function build(list, tokens) {
  list.replaceChildren();
  const spans = tokens.map((token, i) => {
    const span = document.createElement("span");
    span.dataset.i = i;
    span.className = "pp-tok";
    span.textContent = token.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
    list.append(span);
    for (let n = token.split("\n").length; n > 1; n--) list.append(document.createElement("br"));
    return span;
  });
  return spans;
}

function render({ model, el }) {
  el.classList.add("pp-text-root");
  const list = document.createElement("div");
  list.className = "pp-text";
  list.tabIndex = 0;
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "The text. Arrow keys move the chosen token.");
  el.append(list);
  let spans = [];
  let before = [];
  let queued = false;
  let hovered = -1;
  let shown = -2;

  const paint = () => {
    queued = false;
    const chosen = model.get("chosen");
    const moved = chosen !== shown;
    const salience = bytes(model.get("salience"));
    const kept = bytes(model.get("kept"));
    const kind = bytes(model.get("kind"));
    const other = bytes(model.get("other"));
    const one = (code) => code > 0 && code < 4; // read one by one
    const [from, to] = model.get("marked");
    for (let i = 0; i < spans.length; i++) {
      const look = `${salience[i]},${kept[i]},${kind[i]},${other[i]},${i === chosen}`;
      if (look === before[i]) continue;
      before[i] = look;
      const span = spans[i];
      const seen = KINDS[kind[i]] || "unseen";
      const only = !other.length || one(kind[i]) === one(other[i]) ? "" : one(kind[i]) ? " pp-only-b" : " pp-only-a";
      span.className = `pp-tok pp-${seen}${kept[i] ? "" : " pp-dropped"}${i === chosen ? " pp-chosen" : ""}${i >= from && i < to ? " pp-fact" : ""}${only}`;
      span.style.backgroundColor = `rgba(240, 228, 66, ${((salience[i] || 0) / 255 * 0.75).toFixed(2)})`;
      if (i === chosen) span.setAttribute("aria-selected", "true");
      else span.removeAttribute("aria-selected");
    }
    if (moved) show(chosen);
    list.dataset.request = model.get("request");
    // The kernel waits for this before it sends the next picture.
    setTimeout(() => {
      model.set("painted", model.get("request"));
      model.save_changes();
    }, 0);
  };
  const queue = () => {
    if (!queued) requestAnimationFrame(paint);
    queued = true;
  };
  const rebuild = () => {
    spans = build(list, model.get("tokens"));
    before = [];
    shown = -2;
    queue();
  };
  const show = (chosen) => {
    if (into(chosen)) shown = chosen;
  };
  const into = (i) => {
    const span = spans[i];
    const box = list.getBoundingClientRect();
    if (!span || !box.height) return false;
    const at = span.getBoundingClientRect();
    if (at.top < box.top || at.bottom > box.bottom) list.scrollTop += at.top - box.top - box.height / 2;
    return true;
  };
  const choose = (i) => {
    if (i < 0 || i >= spans.length) return;
    model.set("clicked", [i, (model.get("clicked")[1] || 0) + 1]);
    model.save_changes();
  };
  const hover = (event) => {
    const i = event.target.dataset && event.target.dataset.i;
    if (i === undefined || +i === hovered) return;
    hovered = +i;
    const view = model.get("gate");
    const gates = new Int16Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    const values = model.get("raw");
    const raw = new Float32Array(values.buffer.slice(values.byteOffset, values.byteOffset + values.byteLength));
    const gate = gates[hovered] < 0 ? "no gate (an anchor or a skipped token)" : `gate ${gates[hovered]}`;
    const kind = bytes(model.get("kind"))[hovered] || 0;
    const facts = `token ${hovered} · salience ${(raw[hovered] || 0).toFixed(2)} · ${gate} · ${WORDS[kind]}`;
    const terms = model.get("terms");
    const taught = ["salience", "gate", TAUGHT[kind]].filter((word) => word).map((word) => `${word}: ${terms[word]}`);
    event.target.title = [facts, ...taught].join("\n\n");
  };

  list.addEventListener("click", (event) => {
    if (event.target.dataset.i !== undefined) choose(+event.target.dataset.i);
  });
  list.addEventListener("mouseover", hover);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    choose(Math.max(0, Math.min(spans.length - 1, model.get("chosen") + step)));
  });
  model.on("change:tokens", rebuild);
  model.on("change:look", () => into(model.get("look")[0]));
  model.on("change:request", () => {
    hovered = -1;
    queue();
  });
  // Plotly reacts only to a resized window, so the resizing of this box is passed on as such an event.
  let width = 0;
  const room = new ResizeObserver(() => {
    const app = el.closest(".pp-panels") || el;
    if (app.clientWidth === width) return;
    width = app.clientWidth;
    window.dispatchEvent(new Event("resize"));
    // A list that was hidden has lost its scroll position.
    shown = -2;
    queue();
  });
  room.observe(el);
  rebuild();
  return () => {
    room.disconnect();
    model.off("change:tokens", rebuild);
    list.remove();
  };
}
export default { render };
