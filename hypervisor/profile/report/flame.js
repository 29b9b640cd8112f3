// vCPU, reason, device, register, place: each as wide as its handler time or its exits.

const ROW = 26;
const flame = { by: "ns", layer: "user", root: null, at: null, frames: [] };

function node(name, up) {
  return { name, up, value: 0, under: new Map(), colour: null, layer: up?.layer };
}

function descend(from, name) {
  if (!from.under.has(name)) from.under.set(name, node(name, from));
  return from.under.get(name);
}

/** Build the tree. A row is divided among the places that were sampled in it, in proportion. */
function grow() {
  const root = node("all", null);
  for (const row of data.rows) {
    const value = flame.by === "ns" ? row.total : row.count;
    if (!value || row.layer !== flame.layer) continue;
    const register = row.register ? [row.register, row.direction].filter(Boolean).join(" ") : null;
    const names = [row.vcpu === null ? null : `vCPU ${row.vcpu}`, row.reason, row.where, register];
    let at = root;
    at.value += value;
    for (const name of names.filter((each) => each !== null)) {
      at = descend(at, name);
      at.value += value;
      at.layer = row.layer;
      if (name === row.where || name === register || (row.where === null && name === row.reason)) at.colour = colourOf(row.what);
    }
    for (const [symbol, count] of row.symbols) {
      const leaf = descend(at, data.symbols[symbol]);
      leaf.value += (value * count) / row.samples;
      leaf.colour = at.colour;
    }
  }
  return root;
}

const weight = (value) => (flame.by === "ns" ? time(value) : `${number(Math.round(value))} exits`);

function ancestors(at) {
  const out = [];
  for (let up = at; up; up = up.up) out.unshift(up);
  return out;
}

/** Lay frames out below one that spans `left` to `right` (parts of the width); what is too narrow to see is left out. */
function place(at, depth, left, right, above, out) {
  const width = byId("flame").clientWidth;
  if ((right - left) * width < 0.7) return;
  out.push({ at, depth, left, right, above });
  let from = left;
  for (const child of [...at.under.values()].sort((a, b) => b.value - a.value)) {
    const to = from + ((right - left) * child.value) / at.value;
    place(child, depth + 1, from, Math.min(to, right), false, out);
    from = to;
  }
}

function drawFlame(focus = false) {
  const box = byId("flame");
  const chain = ancestors(flame.at);
  const out = chain.slice(0, -1).map((at, depth) => ({ at, depth, left: 0, right: 1, above: true }));
  if (flame.at.value) place(flame.at, chain.length - 1, 0, 1, false, out);
  flame.frames = out;
  const width = box.clientWidth;
  const buttons = out.map((frame, index) => {
    const wide = (frame.right - frame.left) * width;
    const classes = ["frame", wide < 24 ? "tiny" : null, frame.above ? "above" : null, frame.at.colour === null ? null : `c${frame.at.colour}`];
    const label = `${frame.at.name}, ${weight(frame.at.value)}, ${percent(frame.at.value, flame.root.value)}`;
    const button = make("button", { type: "button", class: classes.filter(Boolean).join(" "), "aria-label": label, tabindex: frame.at === flame.at ? 0 : -1, "data-index": index },
      wide < 24 ? "" : frame.at.name);
    button.style.left = `${frame.left * 100}%`;
    button.style.width = `${(frame.right - frame.left) * 100}%`;
    button.style.top = `${frame.depth * ROW}px`;
    frame.button = button;
    return button;
  });
  box.replaceChildren(...buttons);
  box.style.height = `${(out.reduce((most, frame) => Math.max(most, frame.depth), 0) + 1) * ROW}px`;
  byId("path").textContent = flame.at.up ? ancestors(flame.at).slice(1).map((at) => at.name).join(" \u203a ") : "";
  byId("flame-up").disabled = !flame.at.up;
  if (!out.length) box.append(make("p", { class: "empty" }, "No exits."));
  if (focus) out.find((frame) => frame.at === flame.at)?.button.focus();
}

function tellFrame(at, x, y) {
  const lines = [[null, flame.by === "ns" ? "handler time" : "exits", flame.by === "ns" ? time(at.value) : number(Math.round(at.value))],
    [null, "of all", percent(at.value, flame.root.value)]];
  if (at.up) lines.push([null, `of ${at.up.name}`, percent(at.value, at.up.value)]);
  if (at.layer) lines.push([null, "counted by", at.layer === "user" ? "hv (user)" : "KVM (kernel)"]);
  tell(x, y, ancestors(at).slice(at.up ? 1 : 0).map((each) => each.name).join(" \u203a "), lines);
}

function frameOf(event) {
  const button = event.target.closest?.(".frame");
  return button ? flame.frames[Number(button.dataset.index)] : null;
}

function onFlameKey(event) {
  const frame = frameOf(event);
  if (!frame) return;
  const parent = flame.frames.find((each) => each.at === frame.at.up);
  const level = flame.frames.filter((each) => each.depth === frame.depth);
  const place = level.indexOf(frame);
  const next = {
    ArrowUp: parent, ArrowLeft: level[place - 1], ArrowRight: level[place + 1],
    ArrowDown: flame.frames.find((each) => each.at.up === frame.at),
  }[event.key];
  if (event.key === "Escape") zoom(flame.root, true);
  else if (next) {
    flame.frames.forEach((each) => each.button.setAttribute("tabindex", each === next ? 0 : -1));
    next.button.focus();
  } else if (!event.key.startsWith("Arrow")) return;
  event.preventDefault();
}

function zoom(at, focus) {
  flame.at = at;
  untell();
  drawFlame(focus);
}

/** Show another weight or layer: what is looked at stays, as far as it is there. The layers are never added up. */
function weigh(by, layer) {
  const names = ancestors(flame.at).slice(1).map((at) => at.name);
  [flame.by, flame.layer] = [by, layer];
  flame.at = flame.root = grow();
  for (const name of names) flame.at = flame.at.under.get(name) ?? flame.at;
  for (const each of ["ns", "count"]) byId(`by-${each}`).setAttribute("aria-pressed", String(each === by));
  for (const each of ["user", "kernel"]) byId(`of-${each}`).setAttribute("aria-pressed", String(each === layer));
  byId("kernel-hint").hidden = layer === "user";
  drawFlame();
}

flame.at = flame.root = grow();
for (const by of ["ns", "count"]) byId(`by-${by}`).addEventListener("click", () => weigh(by, flame.layer));
for (const layer of ["user", "kernel"]) byId(`of-${layer}`).addEventListener("click", () => weigh(flame.by, layer));
byId("whose").hidden = !data.rows.some((row) => row.layer === "kernel");
byId("flame-up").addEventListener("click", () => zoom(flame.root));
byId("flame").addEventListener("click", (event) => {
  const frame = frameOf(event);
  if (frame) zoom(frame.at, true);
});
byId("flame").addEventListener("keydown", onFlameKey);
byId("flame").addEventListener("pointermove", (event) => {
  const frame = frameOf(event);
  if (frame) tellFrame(frame.at, event.clientX, event.clientY);
});
byId("flame").addEventListener("pointerleave", untell);
byId("flame").addEventListener("focusin", (event) => {
  const frame = frameOf(event);
  if (!frame?.button.matches(":focus-visible")) return;
  const box = frame.button.getBoundingClientRect();
  tellFrame(frame.at, box.left, box.bottom);
});
byId("flame").addEventListener("focusout", untell);
let flameWidth = 0;
new ResizeObserver(() => {
  if (byId("flame").clientWidth === flameWidth) return;
  flameWidth = byId("flame").clientWidth;
  drawFlame();
}).observe(byId("flame"));
