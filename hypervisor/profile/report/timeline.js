// Exits over time, stacked by device. The span that is looked at is shared with the heat map.

const LEFT = 58, RIGHT = 10, TOP = 34, BOTTOM = 22;
const view = { from: 0, to: data.wall, hidden: new Set(), cursor: null, brush: null, listeners: [] };

function look(from, to) {
  const least = (data.wall / (data.trace?.bins ?? 1)) * 8;
  if (to - from < least) {
    const middle = Math.max(least / 2, Math.min((from + to) / 2, data.wall - least / 2));
    [from, to] = [middle - least / 2, middle + least / 2];
  }
  view.from = Math.max(0, from);
  view.to = Math.min(data.wall, to);
  byId("unzoom").disabled = view.from <= 0 && view.to >= data.wall;
  view.listeners.forEach((redraw) => redraw());
}

/** Add bins of the span up to columns of three pixels or more: [first bin, bin after the last, count of each series]. */
function columns(width) {
  const { bins, counts } = data.trace;
  const per = data.wall / bins;
  const first = Math.floor(view.from / per), last = Math.min(bins, Math.ceil(view.to / per));
  const step = Math.max(1, Math.ceil(((last - first) * 3) / width));
  const out = [];
  for (let at = first - (first % step); at < last; at += step) {
    const end = Math.min(at + step, bins);
    out.push([at, end, counts.map((series) => series.slice(at, end).reduce((sum, count) => sum + count, 0))]);
  }
  return out;
}

function drawTimeline() {
  const box = byId("timeline");
  const width = box.clientWidth, height = box.clientHeight;
  const inner = width - LEFT - RIGHT, tall = height - TOP - BOTTOM;
  const per = data.wall / data.trace.bins;
  const x = (ns) => LEFT + ((ns - view.from) / (view.to - view.from)) * inner;
  const cols = columns(inner);
  view.columns = cols;
  const height_of = ([from, to, counts]) => counts.reduce((sum, count, i) => sum + (view.hidden.has(i) ? 0 : count), 0) / ((to - from) * per);
  const most = Math.max(...cols.map(height_of), 1e-12) * 1e9;
  const y = (rate) => TOP + tall * (1 - rate / most);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const each of ticks(0, most, 4)) {
    svg.append(make("line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: y(each), y2: y(each) }),
      make("text", { x: LEFT - 8, y: y(each) + 4, "text-anchor": "end" }, each ? `${short(each)}/s` : "0"));
  }
  const paths = data.series.map(() => "");
  for (const [from, to, counts] of cols) {
    const left = Math.max(LEFT, x(from * per)), right = Math.min(width - RIGHT, x(to * per));
    let base = 0;
    counts.forEach((count, i) => {
      if (!count || view.hidden.has(i)) return;
      const next = base + (count / ((to - from) * per)) * 1e9;
      paths[i] += `M${left.toFixed(1)} ${y(next).toFixed(1)}H${right.toFixed(1)}V${y(base).toFixed(1)}H${left.toFixed(1)}z`;
      base = next;
    });
  }
  paths.forEach((path, i) => path && svg.append(make("path", { class: `f${colourOf(data.series[i])}`, d: path })));
  svg.append(make("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: TOP + tall, y2: TOP + tall }));
  drawTimes(svg, x, width, height);
  drawMarks(svg, x, width, TOP + tall);
  if (view.brush) {
    const [left, right] = view.brush.map(x).sort((a, b) => a - b);
    svg.append(make("rect", { class: "brush", x: left, y: TOP, width: right - left, height: tall }));
  }
  if (view.cursor !== null) svg.append(make("line", { class: "cursor", x1: x(view.cursor), x2: x(view.cursor), y1: TOP, y2: TOP + tall }));
  box.replaceChildren(svg);
}

function drawTimes(svg, x, width, height) {
  for (const each of ticks(view.from, view.to, Math.max(2, width / 130))) {
    if (x(each) > width - 30) continue;
    svg.append(make("text", { x: x(each), y: height - 5, "text-anchor": each <= view.from ? "start" : "middle" }, time(each)));
  }
}

/** Draw marks as lines; their names in two rows, where they find room. */
function drawMarks(svg, x, width, bottom) {
  const ends = [-Infinity, -Infinity];
  for (const [name, at] of data.marks) {
    if (at < view.from || at > view.to) continue;
    const short = name.length > 24 ? `${name.slice(0, 23)}\u2026` : name;
    const long = short.length * 7 + 10;
    const left = Math.max(LEFT, Math.min(x(at) + 4, width - long));
    svg.append(make("line", { class: "mark", x1: x(at), x2: x(at), y1: 6, y2: bottom }));
    const row = ends.findIndex((end) => left > end);
    if (row < 0) continue;
    ends[row] = left + long;
    svg.append(make("text", { class: "mark-name", x: left, y: 13 + row * 14 }, short));
  }
}

/** Tell what happened at a time, or while a span is being selected, in all of it. */
function tellColumn(ns, x, y) {
  const per = data.wall / data.trace.bins;
  const [low, high] = view.brush ? [...view.brush].sort((a, b) => a - b) : [ns, ns];
  const found = view.columns.filter(([from, to]) => high >= from * per && low < to * per);
  if (!found.length) return untell();
  const from = found[0][0], to = found.at(-1)[1];
  const lines = data.series.map((name, i) => [colourOf(name), name, found.reduce((sum, column) => sum + column[2][i], 0)])
    .filter(([, , count], i) => count && !view.hidden.has(i)).sort((a, b) => b[2] - a[2]);
  const sum = lines.reduce((all, line) => all + line[2], 0);
  const near = data.marks.filter(([, at]) => at >= from * per && at < to * per).map(([name]) => [null, `mark: ${name}`, ""]);
  tell(x, y, `${time(from * per)} to ${time(to * per)}`, [
    ...lines.map(([colour, name, count]) => [colour, name, number(count)]),
    [null, "exits", `${number(sum)}, ${rate(sum, (to - from) * per)}/s`], ...near]);
}

/** Let a pointer hover over and drag across an element whose width shows the span. */
function followPointer(element, hover) {
  const at = (event) => {
    const box = element.getBoundingClientRect();
    const part = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    return view.from + Math.max(0, Math.min(part, 1)) * (view.to - view.from);
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    view.brush = [at(event), at(event)];
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    view.cursor = at(event);
    if (view.brush) view.brush[1] = view.cursor;
    view.listeners.forEach((redraw) => redraw());
    hover(view.cursor, event.clientX, event.clientY);
  });
  element.addEventListener("pointerup", (event) => {
    const brush = view.brush?.sort((a, b) => a - b);
    view.brush = null;
    if (brush && brush[1] - brush[0] > (view.to - view.from) / 200) look(...brush);
    else hover(at(event), event.clientX, event.clientY);
  });
  for (const kind of ["pointerleave", "pointercancel"]) {
    element.addEventListener(kind, () => {
      [view.cursor, view.brush] = [null, null];
      view.listeners.forEach((redraw) => redraw());
      untell();
    });
  }
  element.addEventListener("dblclick", () => look(0, data.wall));
}

function onTimelineKey(event) {
  const step = (view.to - view.from) / 50;
  if (event.key === "Escape") look(0, data.wall);
  else if (event.key === "Enter" && view.brush) {
    const brush = view.brush.sort((a, b) => a - b);
    view.brush = null;
    look(...brush);
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    const old = view.cursor ?? (view.from + view.to) / 2;
    view.cursor = Math.max(view.from, Math.min(old + (event.key === "ArrowLeft" ? -step : step), view.to - step / 100));
    view.brush = event.shiftKey ? [view.brush?.[0] ?? old, view.cursor] : null;
    drawTimeline();
    const box = byId("timeline").getBoundingClientRect();
    tellColumn(view.cursor, box.left + LEFT + ((view.cursor - view.from) / (view.to - view.from)) * (box.width - LEFT - RIGHT), box.top + TOP);
  } else return;
  event.preventDefault();
}

function showLegend() {
  data.series.forEach((name, i) => {
    const button = make("button", { type: "button", "aria-pressed": "true" }, make("i", { class: `b${colourOf(name)}` }), name);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(i)) view.hidden.add(i);
      button.setAttribute("aria-pressed", String(!view.hidden.has(i)));
      drawTimeline();
    });
    byId("legend").append(button);
  });
}

if (data.trace) {
  byId("timeline-section").hidden = false;
  view.listeners.push(drawTimeline);
  showLegend();
  followPointer(byId("timeline"), tellColumn);
  byId("timeline").addEventListener("keydown", onTimelineKey);
  byId("timeline").addEventListener("blur", untell);
  byId("unzoom").addEventListener("click", () => look(0, data.wall));
  new ResizeObserver(drawTimeline).observe(byId("timeline"));
}
