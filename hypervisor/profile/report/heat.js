// How long exits took over time; without a trace, how long they took in all.

/** Colours of few to many: the few recede into the surface. */
const RAMPS = {
  light: [[222, 235, 250], [134, 182, 239], [42, 120, 214], [13, 54, 107]],
  dark: [[31, 48, 74], [28, 92, 171], [85, 152, 231], [222, 235, 250]],
};

function shade(part) {
  const ramp = RAMPS[dark.matches ? "dark" : "light"];
  const at = Math.max(0, Math.min(part, 1)) * (ramp.length - 1);
  const low = Math.min(Math.floor(at), ramp.length - 2);
  const mixed = ramp[low].map((value, i) => Math.round(value + (ramp[low + 1][i] - value) * (at - low)));
  return `rgb(${mixed.join(" ")})`;
}

const heat = { cells: [], low: 0, high: 1, most: 1 };

/** Unpack the cells, and find the rows between the shortest and the longest time. */
function readHeat() {
  const { heat: flat, heat_steps: steps } = data.trace;
  for (let i = 0; i < flat.length; i += 2) heat.cells.push([Math.floor(flat[i] / steps), flat[i] % steps, flat[i + 1]]);
  const rows = heat.cells.map((cell) => cell[1]);
  const per = data.trace.heat_per_power;
  heat.low = Math.floor(rows.reduce((a, b) => Math.min(a, b), steps) / per) * per;
  heat.high = Math.ceil((rows.reduce((a, b) => Math.max(a, b), 0) + 1) / per) * per;
  if (heat.high <= heat.low) [heat.low, heat.high] = [0, steps];
  heat.most = heat.cells.reduce((most, cell) => Math.max(most, cell[2]), 2);
}

/** The time that a row of cells begins at. */
const latency = (row) => 2 ** (data.trace.heat_low + row / data.trace.heat_per_power);

function drawHeat() {
  const canvas = byId("heat");
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const top = 6, tall = height - top - BOTTOM, inner = width - LEFT - RIGHT;
  const x = (ns) => LEFT + ((ns - view.from) / (view.to - view.from)) * inner;
  const y = (row) => top + tall * (1 - (row - heat.low) / (heat.high - heat.low));
  const per = data.wall / data.trace.heat_bins;
  context.font = "12px system-ui, sans-serif";
  context.strokeStyle = style.getPropertyValue("--grid");
  context.fillStyle = style.getPropertyValue("--soft");
  context.textAlign = "right";
  for (let power = 1; power < 1e11; power *= 10) {
    const row = (Math.log2(power) - data.trace.heat_low) * data.trace.heat_per_power;
    if (row < heat.low || row > heat.high) continue;
    context.beginPath();
    context.moveTo(LEFT, y(row));
    context.lineTo(width - RIGHT, y(row));
    context.stroke();
    context.fillText(time(power).replace(/\.0+ /, " "), LEFT - 8, Math.min(y(row) + 4, height - BOTTOM));
  }
  context.textAlign = "center";
  for (const each of ticks(view.from, view.to, Math.max(2, width / 130))) {
    context.textAlign = each <= view.from ? "left" : "center";
    if (x(each) <= width - 30) context.fillText(time(each), x(each), height - 5);
  }
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, inner, height - BOTTOM + 1);
  context.clip();
  for (const [bin, row, count] of heat.cells) {
    if ((bin + 1) * per < view.from || bin * per > view.to) continue;
    context.fillStyle = shade(Math.log(count + 1) / Math.log(heat.most + 1));
    const left = Math.floor(x(bin * per) * ratio) / ratio, over = Math.floor(y(row + 1) * ratio) / ratio;
    context.fillRect(left, over, Math.ceil(x((bin + 1) * per) * ratio) / ratio - left, Math.ceil(y(row) * ratio) / ratio - over);
  }
  context.strokeStyle = style.getPropertyValue("--ink");
  context.setLineDash([3, 3]);
  for (const [, at] of data.marks) line(context, x(at), top, height - BOTTOM);
  context.setLineDash([]);
  if (view.brush) {
    const [left, right] = view.brush.map(x).sort((a, b) => a - b);
    context.globalAlpha = 0.18;
    context.fillStyle = style.getPropertyValue("--accent");
    context.fillRect(left, top, right - left, tall);
  }
  if (view.cursor !== null) line(context, x(view.cursor), top, height - BOTTOM);
  context.restore();
}

function line(context, x, from, to) {
  context.globalAlpha = 0.5;
  context.beginPath();
  context.moveTo(x, from);
  context.lineTo(x, to);
  context.stroke();
}

function tellCell(ns, x, y) {
  const box = byId("heat").getBoundingClientRect();
  const part = 1 - (y - box.top - 6) / (box.height - 6 - BOTTOM);
  const row = Math.floor(heat.low + part * (heat.high - heat.low));
  const per = data.wall / data.trace.heat_bins;
  const bin = Math.min(Math.floor(ns / per), data.trace.heat_bins - 1);
  const here = heat.cells.find((cell) => cell[0] === bin && cell[1] === row);
  const all = heat.cells.filter((cell) => cell[0] === bin).reduce((sum, cell) => sum + cell[2], 0);
  tell(x, y, `${time(bin * per)} to ${time((bin + 1) * per)}`, [
    [null, `took ${time(latency(row))} to ${time(latency(row + 1))}`, `${number(here ? here[2] : 0)} exits`],
    [null, "any time", `${number(all)} exits`]]);
}

/** Draw a row's times as bars on a scale from `low` to `high`, in quarters of powers of two. */
function bars(times, low, high, colour, width, height) {
  let most = 1;
  for (let i = 1; i < times.length; i += 2) most = Math.max(most, times[i]);
  let path = "";
  const step = width / (high - low);
  for (let i = 0; i < times.length; i += 2) {
    const tall = Math.max(1, (times[i + 1] / most) * height);
    path += `M${((times[i] - low) * step).toFixed(2)} ${height}v${-tall.toFixed(2)}h${(step * 0.85).toFixed(2)}v${tall.toFixed(2)}z`;
  }
  return make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, preserveAspectRatio: "none", "aria-hidden": "true" },
    make("path", { class: `f${colour}`, d: path }));
}

/** The quarters of powers of two that rows' times lie in. */
function spanOf(rows) {
  const starts = rows.flatMap((row) => row.times.filter((_, i) => i % 2 === 0));
  return starts.length ? [starts.reduce((a, b) => Math.min(a, b)), starts.reduce((a, b) => Math.max(a, b)) + 1] : [0, 1];
}

function showTimes() {
  const rows = ["user", "kernel"].flatMap((layer) => data.total.filter((row) => row.layer === layer).slice(0, 20));
  const [low, high] = spanOf(rows);
  for (const row of rows) {
    const drawn = make("div", {}, bars(row.times, low, high, colourOf(row.what), 400, 30));
    drawn.addEventListener("pointermove", (event) => tellRow(row, event.clientX, event.clientY));
    drawn.addEventListener("pointerleave", untell);
    byId("times").append(make("div", { class: "times-row" }, make("span", { title: row.name }, row.layer === "user" ? row.name : `${row.name} (KVM)`), drawn));
  }
  const scale = [0, 0.25, 0.5, 0.75, 1].map((part) => make("span", {}, time(2 ** ((low + part * (high - low)) / 4))));
  byId("times").append(make("div", { class: "times-row" }, make("span", {}), make("div", { class: "scale" }, ...scale)));
}

function tellRow(row, x, y) {
  tell(x, y, row.name, [
    [null, `exits (${row.layer})`, number(row.count)], [null, "handler time", time(row.total)], [null, "p50", time(row.p50)],
    [null, "p90", time(row.p90)], [null, "p99", time(row.p99)], [null, "max", time(row.max)]]);
}

if (data.trace) {
  readHeat();
  view.listeners.push(drawHeat);
  followPointer(byId("heat"), tellCell);
  new ResizeObserver(drawHeat).observe(byId("heat"));
  dark.addEventListener("change", drawHeat);
} else if (data.total.length) {
  byId("times-section").hidden = false;
  showTimes();
}
