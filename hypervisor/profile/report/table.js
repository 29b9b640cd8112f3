// The table of all kinds of exits, and that of KVM's counters.

const all = data.wall * Math.max(data.vcpus.length, 1);
const topPlace = (row) => data.symbols[row.symbols[0][0]];
const allPlaces = (row) => row.symbols.map(([symbol, count]) => `${percent(count, row.samples)} ${data.symbols[symbol]}`);
/** Where, and how many bytes: 0xcfc/4. */
const address = (row) => [row.address, row.address && row.size].filter(Boolean).join("/");
const COLUMNS = [
  { title: "Exit", text: true, places: true, value: (row) => row.name },
  { title: "Layer", text: true, value: (row) => row.layer },
  { title: "vCPU", value: (row) => row.vcpu ?? -1, show: (row) => (row.vcpu === null ? "all" : String(row.vcpu)) },
  { title: "Address", value: (row) => (row.address === null ? -1 : Number(row.address)), show: address },
  { title: "Exits", value: (row) => row.count, show: (row) => number(row.count) },
  { title: "Exits/s", value: (row) => row.count, show: (row) => rate(row.count, data.wall) },
  { title: "Share", value: (row) => row.total, show: (row) => percent(row.total, all) },
  { title: "p50", value: (row) => row.p50, show: (row) => time(row.p50) },
  { title: "p90", value: (row) => row.p90, show: (row) => time(row.p90) },
  { title: "p99", value: (row) => row.p99, show: (row) => time(row.p99) },
  { title: "Max", value: (row) => row.max, show: (row) => time(row.max) },
  { title: "Total", value: (row) => row.total, show: (row) => time(row.total) },
  { title: "Times", text: true, drawn: true },
];
const AT_FIRST = 60;
const table = { by: COLUMNS.findIndex((column) => column.title === "Total"), down: true, shown: AT_FIRST };

/** What the filter looks through. */
function words(row) {
  const places = row.symbols.map(([symbol]) => data.symbols[symbol]);
  return [row.name, row.where, row.address, ...places].join(" ").toLowerCase();
}

function matching() {
  const vcpu = byId("vcpu").value, layer = byId("layer").value;
  const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = vcpu === "" ? data.total : data.rows.filter((row) => String(row.vcpu) === vcpu);
  return rows.filter((row) => (!layer || row.layer === layer) && wanted.every((word) => words(row).includes(word)));
}

function sorted(rows) {
  const { value, text } = COLUMNS[table.by];
  const order = text ? (a, b) => value(a).localeCompare(value(b)) : (a, b) => value(a) - value(b);
  return [...rows].sort((a, b) => (table.down ? order(b, a) : order(a, b)));
}

function cell(column, row, span) {
  if (column.drawn) return make("td", { class: "text" }, bars(row.times, ...span, colourOf(row.what), 90, 18));
  const shown = column.show ? column.show(row) : column.value(row);
  const places = column.places && row.symbols.length ? make("small", {}, `most from ${topPlace(row)}`) : null;
  return make("td", { class: column.text ? "text" : null, title: column.places ? [shown, ...allPlaces(row)].join("\n") : null }, shown, places);
}

function showRows() {
  const rows = sorted(matching());
  const span = spanOf(rows);
  const body = rows.slice(0, table.shown).map((row) => make("tr", {}, ...COLUMNS.map((column) => cell(column, row, span))));
  if (!rows.length) body.push(make("tr", {}, make("td", { class: "text empty", colspan: COLUMNS.length }, "Nothing matches.")));
  byId("exits").tBodies[0].replaceChildren(...body);
  const left_out = data.left_out ? `, ${data.left_out} more with less time are not in this page` : "";
  byId("matches").textContent = `${rows.length} of ${byId("vcpu").value === "" ? data.total.length : data.rows.length} kinds${left_out}`;
  byId("more").hidden = rows.length <= table.shown;
  byId("more").textContent = `Show all ${rows.length}`;
  byId("exits").tHead.rows[0].querySelectorAll("th").forEach((head, i) => {
    if (i === table.by) head.setAttribute("aria-sort", table.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    const arrow = head.querySelector("button span");
    if (arrow) arrow.textContent = i === table.by ? (table.down ? " \u25be" : " \u25b4") : "";
  });
}

function showHeadings() {
  COLUMNS.forEach((column, i) => {
    const head = make("th", { scope: "col", class: column.text ? "text" : null });
    if (column.drawn) head.append(column.title);
    else {
      const button = make("button", { type: "button" }, column.title, make("span", { "aria-hidden": "true" }));
      button.addEventListener("click", () => {
        table.down = table.by === i ? !table.down : !column.text;
        table.by = i;
        showRows();
      });
      head.append(button);
    }
    byId("exits").tHead.rows[0].append(head);
  });
}

function showFilters() {
  const options = (values) => values.map((value) => make("option", { value }, String(value)));
  byId("layer").append(...options([...new Set(data.rows.map((row) => row.layer))]));
  byId("vcpu").append(...options(data.vcpus.map((vcpu) => vcpu.index)));
  if (data.rows.some((row) => row.layer === "user")) byId("layer").value = "user";
  for (const id of ["filter", "layer", "vcpu"]) {
    byId(id).addEventListener("input", () => {
      table.shown = AT_FIRST;
      showRows();
    });
  }
  byId("more").addEventListener("click", () => {
    table.shown = Infinity;
    showRows();
  });
}

function showKvm() {
  const owners = Object.keys(data.kvm);
  const names = [...new Set(owners.flatMap((owner) => Object.keys(data.kvm[owner]).filter((name) => data.kvm[owner][name])))].sort();
  if (!names.length) return;
  byId("kvm-section").hidden = false;
  const head = make("tr", {}, make("th", { scope: "col", class: "text" }, "Counter"), ...owners.map((owner) => make("th", { scope: "col" }, owner)));
  const rows = names.map((name) => make("tr", {}, make("th", { scope: "row", class: "text" }, name),
    ...owners.map((owner) => make("td", {}, data.kvm[owner][name] ? String(data.kvm[owner][name]) : ""))));
  byId("kvm").append(make("thead", {}, head), make("tbody", {}, ...rows));
}

showFilters();
showHeadings();
showRows();
showKvm();
