// A card and a frame, placed over the panel that holds this widget, beside the part that the step speaks of.
const CARD_WIDTH = 360; // pixels
const EDGE = 5; // between what is framed and the outside of the frame
const GAP = 10; // between what is framed and the card

function button(words, act, name) {
  const made = document.createElement("button");
  made.className = `jupyter-button lm-Widget ${name}`;
  made.textContent = words;
  made.addEventListener("click", act);
  return made;
}

function render({ model, el }) {
  let app = null;
  const frame = document.createElement("div");
  frame.className = "pp-tour-frame";
  const card = document.createElement("div");
  card.className = "pp-tour";
  card.tabIndex = -1;
  card.setAttribute("role", "dialog");
  const count = document.createElement("span");
  const title = document.createElement("b");
  const words = document.createElement("p");
  const row = document.createElement("div");
  const go = (step) => {
    model.set("step", step > model.get("steps").length ? 0 : step);
    model.save_changes();
  };
  const back = button("Back", () => go(model.get("step") - 1), "pp-tour-back");
  const next = button("Next", () => {
    const last = model.get("step") === model.get("steps").length;
    go(model.get("step") + 1);
    if (last && app) app.scrollIntoView({ block: "start" }); // back to the sliders
  }, "pp-tour-next mod-info");
  const skip = button("End the tour", () => go(0), "pp-tour-end");
  row.append(back, next, skip);
  card.append(count, title, words, row);
  el.append(frame, card);
  const place = () => {
    const step = model.get("steps")[model.get("step") - 1];
    app = el.closest(".pp-app");
    const target = step && app && app.querySelector(step.element);
    const at = target && target.getBoundingClientRect();
    const shown = Boolean(at && at.height);
    frame.hidden = !shown;
    card.hidden = !step || !app;
    if (card.hidden) return;
    const edge = app.getBoundingClientRect();
    const home = { left: edge.left + app.clientLeft, top: edge.top + app.clientTop, width: app.clientWidth, height: app.clientHeight };
    const box = { left: 0, top: 0, width: home.width, height: 0 };
    if (shown) {
      const [left, right, top, bottom] = step.part || [0, 1, 0, at.height];
      box.left = at.left - home.left + left * at.width;
      box.top = at.top - home.top + top;
      box.width = (right - left) * at.width;
      box.height = Math.min(bottom, at.height) - top;
      Object.assign(frame.style, {
        left: `${box.left - EDGE}px`,
        top: `${box.top - EDGE}px`,
        width: `${box.width + 2 * EDGE}px`,
        height: `${box.height + 2 * EDGE}px`,
      });
    }
    const wide = Math.min(CARD_WIDTH, home.width - 20);
    card.style.width = `${wide}px`;
    const below = box.top + box.height + GAP;
    const fits = below + card.offsetHeight < home.height;
    card.style.top = `${fits ? below : Math.max(0, box.top - card.offsetHeight - GAP)}px`;
    // Beside a wide part the card stands at the right, where it hides less of what is read from the left.
    const left = box.width > 2 * wide ? box.left + box.width - wide : box.left;
    card.style.left = `${Math.max(10, Math.min(left, home.width - wide - 10))}px`;
  };

  const draw = () => {
    const step = model.get("step");
    const steps = model.get("steps");
    const now = steps[step - 1];
    if (now) {
      count.textContent = `${step} of ${steps.length}`;
      title.textContent = now.title;
      words.innerHTML = now.words; // written by the package, not by the user
      back.disabled = step === 1;
      next.textContent = step === steps.length ? "Done" : "Next";
      skip.hidden = step === steps.length;
      card.setAttribute("aria-label", `Guided tour, step ${step} of ${steps.length}: ${now.title}`);
    }
    place();
  };
  const moved = () => {
    draw();
    if (card.hidden) return;
    frame.scrollIntoView({ block: "nearest" });
    card.scrollIntoView({ block: "nearest" });
    card.focus({ preventScroll: true });
  };
  card.addEventListener("keydown", (event) => {
    event.stopPropagation(); // keys of the notebook, such as Escape and Enter, would leave the cell or run it
    if (event.key === "Escape") go(0);
  });
  model.on("change:step", moved);
  const room = new ResizeObserver(place);
  const start = () => {
    app = el.closest(".pp-app");
    if (!app) {
      requestAnimationFrame(start); // not in the page yet
      return;
    }
    for (let at = el; at !== app; at = at.parentElement) at.style.cssText += "position: static; overflow: visible; height: 0; margin: 0";
    room.observe(app);
    for (const part of app.children) room.observe(part);
    draw();
  };
  start();
  return () => {
    room.disconnect();
    model.off("change:step", moved);
  };
}
export default { render };
