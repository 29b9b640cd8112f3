"use strict";
// What all parts of the page use, its head, and the sums.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const seriesOf = new Map(data.series.map((name, index) => [name, index]));
/** The number of a device's colour; the last one is shared. */
const colourOf = (what) => Math.min(seriesOf.get(what) ?? 7, 7);
const dark = matchMedia("(prefers-color-scheme: dark)");

/** Make an element: attributes by name, then children, strings among them. Names of guests only ever become text. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "rect", "line", "text", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function digits(value) {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

function time(ns) {
  if (!ns) return "0";
  for (const [scale, unit] of [[1e9, "s"], [1e6, "ms"], [1e3, "us"], [1, "ns"]]) {
    if (ns >= scale * 0.9995) return `${digits(ns / scale)} ${unit}`;
  }
  return `${ns.toPrecision(2)} ns`;
}

function number(value) {
  if (Number.isInteger(value) && value <= 999999) return String(value);
  for (const [scale, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= scale * 0.9995) return digits(value / scale) + unit;
  }
  return digits(value);
}

/** A number for an axis: as short as can be. */
function short(value) {
  for (const [scale, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= scale) return Number((value / scale).toPrecision(4)) + unit;
  }
  return String(Number(value.toPrecision(4)));
}

function percent(part, whole) {
  if (!whole || !part) return "0%";
  const share = (100 * part) / whole;
  return share >= 0.1 ? `${share.toFixed(1)}%` : "<0.1%";
}

/** How many a second. */
function rate(count, ns) {
  const value = ns ? (count * 1e9) / ns : 0;
  if (value >= 99.5 || !value) return number(Math.round(value));
  return value >= 0.01 ? String(Number(value.toPrecision(2))) : "<0.01";
}

/** Round numbers between two ends, about `wanted` of them. */
function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(wanted, 1);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const out = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) out.push(at);
  return out;
}

// --- the tooltip ------------------------------------------------------------------------------------------------------

/** Show a tooltip beside a point: a title, and lines of [colour number or null, name, value]. */
function tell(x, y, title, lines) {
  const tip = byId("tip");
  const rows = lines.map(([colour, name, value]) =>
    make("tr", {},
      make("td", { class: "text" }, colour === null ? null : make("i", { class: `b${colour}` }), name),
      make("td", {}, value)));
  tip.replaceChildren(make("b", {}, title), make("table", {}, make("tbody", {}, ...rows)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > innerHeight - 8 ? y - 16 - box.height : y + 16;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

function untell() {
  byId("tip").hidden = true;
}
addEventListener("scroll", untell, { passive: true });

// --- head and sums ----------------------------------------------------------------------------------------------------

function showHead() {
  const known = { cpus: "vCPUs", ram_mib: "RAM (MiB)", hv: "hv", created: "made", outcome: "outcome" };
  byId("title").textContent = data.info.kernel ? `Profile of ${data.info.kernel}` : "Profile";
  for (const [name, value] of Object.entries(data.info)) {
    if (name === "kernel") continue;
    byId("facts").append(make("div", {}, make("dt", {}, known[name] ?? name), make("dd", {}, name === "created" ? value.replace("T", " ").replace("+00:00", " UTC") : value)));
  }
  byId("notes").append(...data.notes.map((note) => make("li", {}, note)));
  byId("notes").hidden = !data.notes.length;
}

function showSums() {
  const exits = data.vcpus.reduce((sum, vcpu) => sum + vcpu.exits, 0);
  const all = data.wall * Math.max(data.vcpus.length, 1);
  const handled = data.vcpus.reduce((sum, vcpu) => sum + vcpu.handler_ns, 0);
  const tiles = [
    [time(data.wall), "wall time"],
    [number(exits), "exits to hv"],
    [rate(exits, data.wall), "exits a second"],
    [percent(handled, all), "of the vCPUs' time in hv"],
    [exits ? time(handled / exits) : "-", "in hv for each exit"],
  ];
  byId("tiles").append(...tiles.map(([value, what]) => make("div", {}, make("b", {}, value), make("span", {}, what))));
  for (const vcpu of data.vcpus) showVcpu(vcpu);
  const legend = make("div", { class: "legend plain" });
  for (const [kind, what] of [["guest", "guest, and KVM for it"], ["handler", "hv's handlers"], ["halted", "halted"], ["rest", "not accounted"]]) {
    legend.append(make("span", {}, make("i", { class: kind }), what));
  }
  byId("vcpus").append(legend);
}

function showVcpu(vcpu) {
  const parts = { guest: vcpu.guest_ns, handler: vcpu.handler_ns, halted: vcpu.halted_ns ?? 0 };
  const known = parts.guest + parts.handler + parts.halted;
  const whole = Math.max(data.wall, known);
  const stack = make("div", { class: "stack", role: "img", "aria-label": `vCPU ${vcpu.index}` });
  for (const [kind, ns] of Object.entries({ ...parts, rest: whole - known })) {
    if (!(ns > 0)) continue;
    const piece = make("i", { class: kind });
    piece.style.flex = `${ns / whole} 1 0`;
    stack.append(piece);
  }
  const halted = vcpu.halted_ns === null ? "halts unknown" : `halted ${percent(vcpu.halted_ns, whole)}`;
  const figures = `guest ${percent(parts.guest, whole)}, hv ${percent(parts.handler, whole)}, ${halted}, ${number(vcpu.exits)} exits`;
  byId("vcpus").append(make("div", { class: "vcpu" }, make("span", {}, `vCPU ${vcpu.index}`), stack, make("span", { class: "figures" }, figures)));
}

showHead();
showSums();
