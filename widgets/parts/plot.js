// Draws a figure of plotly, repeats every change that Python makes to it, and passes clicks on.
// After each change plotly's own widget copies all data and all axes, compares them with the former ones and sends every
// default to the kernel, before the browser may paint. Nothing here asks for that.
const { Plotly } = globalThis;
const KINDS = {
  int8: Int8Array, int16: Int16Array, int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
  float32: Float32Array, float64: Float64Array,
};
const figures = new WeakMap(); // the model's list of traces -> { data, layout, views }

const AT_ONCE = { mode: "afterall", frame: { duration: 0, redraw: false }, transition: { duration: 0 } };

// A message as Python meant it: arrays of numbers arrive as bytes, and what stays as it is as "_undefined_".
function read(value) {
  if (value === "_undefined_") return undefined;
  if (Array.isArray(value)) return value.map(read);
  if (value === null || typeof value !== "object") return value;
  if (value.dtype && value.shape) {
    const { buffer, byteOffset, byteLength } = value.buffer;
    return new KINDS[value.dtype](buffer.slice(byteOffset, byteOffset + byteLength));
  }
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, read(part)]));
}

// target.a.b[0].c = value, for a path such as "a.b[0].c"
function put(target, path, value) {
  if (value === undefined) return;
  const names = path.split(/[.[\]]+/).filter((name) => name);
  const last = names.pop();
  for (const name of names) target = target[name] ??= {};
  target[last] = value;
}

// Sets in `targets`, one for each trace, what a message says of them; a list holds a value for each.
function style(targets, values) {
  for (const [path, value] of Object.entries(values)) {
    targets.forEach((target, n) => put(target, path, Array.isArray(value) ? value[n % value.length] : value));
  }
}

function change({ data, layout, views }, message, fixed) {
  const { added, traces } = message;
  for (const view of views) {
    if (added) Plotly.addTraces(view, added);
    else if (!fixed) Plotly.update(view, message.style, message.layout, traces);
    else move(view, message);
  }
  if (views.size) return; // plotly has changed our objects
  if (added) return data.push(...added);
  style(traces.map((at) => data[at]), message.style);
  for (const [path, value] of Object.entries(message.layout)) put(layout, path, value);
}

// Where no scale depends on the data, only what changes is drawn again: most of the time of an update goes into axes.
function move(view, message) {
  if (Object.keys(message.layout).length) Plotly.relayout(view, message.layout);
  if (!message.traces.length) return;
  const data = message.traces.map(() => ({}));
  style(data, message.style);
  Plotly.animate(view, { data, traces: message.traces }, AT_ONCE);
}

// `model` itself is another object each time that we are called.
function figureOf(model) {
  const traces = model.get("_widget_data");
  if (!figures.has(traces)) {
    figures.set(traces, { data: read(traces), layout: read(model.get("_widget_layout")), views: new Set() });
  }
  return figures.get(traces);
}

function initialize({ model }) {
  model.on("change:_change", () => change(figureOf(model), read(model.get("_change")), model.get("_fixed")));
}

function render({ model, el }) {
  const figure = figureOf(model);
  let width = 0;
  const click = ({ points }) => {
    model.set("_js2py_pointsCallback", {
      event_type: "plotly_click",
      points: {
        trace_indexes: points.map((point) => point.curveNumber),
        point_indexes: points.map((point) => point.pointNumber),
        xs: points.map((point) => point.x),
        ys: points.map((point) => point.y),
      },
    });
    model.save_changes();
  };
  // Plotly measures its box, which has no size before it is shown.
  const room = new ResizeObserver(() => {
    if (!el.clientWidth || el.clientWidth === width) return;
    width = el.clientWidth;
    if (figure.views.has(el)) return Plotly.Plots.resize(el);
    figure.views.add(el);
    Plotly.newPlot(el, figure.data, figure.layout, model.get("_config")).then(() => el.on("plotly_click", click));
  });
  room.observe(el);
  return () => {
    room.disconnect();
    figure.views.delete(el);
    Plotly.purge(el);
  };
}
export default { initialize, render };
