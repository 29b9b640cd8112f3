"""The page, in a real browser: what it shows, what its controls do, and that it asks nothing of anybody.

Pictures of it are left in the folder that HV_ARTIFACTS names, or in pytest's own.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from profiles import sample

from hypervisor.profile.exits import ExitRow, Exits
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile, TraceChunk, VcpuTimes
from hypervisor.profile.report import html

CHROMIUM = "/usr/bin/chromium"
INTO = " \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} "
browser_only = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="chromium is not installed (scripts/setup dev)")


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_page_has_no_address_of_anything():
    page = html.render(sample())
    markup = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(src|href|action|poster|data)=", markup)
    assert "url(" not in page
    assert "@import" not in page
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--", "\udcff\0\u2028", "{{script}}", "&lt;"])
def test_names_stay_data(name):
    row = ExitRow(*("user", "io", name, name, 1, "in", 1, 0, 1, 1), Histogram.of([9]), Histogram(), {name: 1})
    profile = Profile(info={"kernel": name}, wall_ns=10, vcpus=[], exits=Exits([row]), marks=[(name, 1)], notes=[name])
    page = html.render(profile)
    page.encode()
    assert page.count("<script") == page.count("</script>") == 2
    data = data_of(page)
    assert data["info"]["kernel"] == data["notes"][0] == data["symbols"][0] == data["marks"][0][0] == name


def test_every_exit_is_in_the_timeline_and_in_the_heat_map():
    trace = data_of(html.render(sample()))["trace"]
    counts = np.array(trace["counts"])
    assert counts.sum() == sum(trace["heat"][1::2]) == 981
    series = data_of(html.render(sample()))["series"]
    assert dict(zip(series, counts.sum(axis=1), strict=True)) == {
        "uart0": 830,
        "pci": 120,
        "hlt": 20,
        "virtio-blk0": 8,
        "open bus 0x2f9": 3,
    }


def test_bins_are_where_the_exits_were():
    """3000 bins of devices and 400 of latencies; a power of two of latencies has six."""
    rows = sample().trace_rows
    at, took = np.array([0.0, 299.0, 300.0, 5e9]), np.array([1.0, 64, 64, 1e12])

    def chunks():
        yield TraceChunk(0, at, took, np.zeros(4, int), np.zeros(4, int))

    profile = Profile(info={}, wall_ns=1200, vcpus=[], exits=sample().exits, trace=chunks, trace_rows=rows)
    trace = data_of(html.render(profile))["trace"]
    assert {i: n for i, n in enumerate(trace["counts"][0]) if n} == {0: 1, 747: 1, 750: 1, 2999: 1}
    steps, low, per = (trace[name] for name in ("heat_steps", "heat_low", "heat_per_power"))
    found = {divmod(cell, steps): count for cell, count in zip(trace["heat"][::2], trace["heat"][1::2], strict=True)}
    at_64 = (6 - low) * per
    assert found == {(0, 0): 1, (99, at_64): 1, (100, at_64): 1, (399, steps - 1): 1}


def test_the_others_share_a_colour():
    rows = [
        ExitRow(
            *("user", "io", f"d{i}", "r", i, "in", 1, 0, 30 - i, 30 - i), Histogram.of([9] * (30 - i)), Histogram(), {}
        )
        for i in range(20)
    ]

    def chunks():
        yield TraceChunk(0, np.zeros(20), np.ones(20), np.arange(20), np.full(20, -1))

    profile = Profile(info={}, wall_ns=9, vcpus=[], exits=Exits(rows), trace=chunks, trace_rows=rows)
    data = data_of(html.render(profile))
    assert data["series"] == ["d0", "d1", "d2", "d3", "d4", "d5", "d6", "others"]
    assert [sum(counts) for counts in data["trace"]["counts"]] == [1] * 7 + [13]


def large(exits, kinds=2000):
    """A profile with many kinds of exits and a long trace."""
    rng = np.random.default_rng(1)
    symbols = [f"some_function_of_the_kernel_{number}" for number in range(3000)]
    rows = [
        ExitRow(
            *("user", "mmio", f"virtio-net{i % 40}", f"register{i}", 0xE0000000 + i, "out", 4, i % 8, 1000, 1000),
            Histogram.of(rng.lognormal(8, 2, 200).astype(int).tolist()),
            Histogram(),
            {symbols[int(number)]: 3 for number in rng.integers(0, 3000, 60)},
        )
        for i in range(kinds)
    ]

    def chunks():
        for start in range(0, exits, 1 << 18):
            size = min(1 << 18, exits - start)
            at = (start + np.arange(size)) * 1000.0
            yield TraceChunk(0, at, rng.lognormal(8, 2, size), rng.integers(0, kinds, size), np.full(size, -1))

    vcpus = [VcpuTimes(index, exits // 8, 1000, 1000, 1000) for index in range(8)]
    return Profile(info={}, wall_ns=exits * 1000, vcpus=vcpus, exits=Exits(rows), trace=chunks, trace_rows=rows)


def test_the_size_depends_on_the_kinds_and_is_bounded():
    small, more = (len(html.render(large(exits))) for exits in (100_000, 2_000_000))
    assert more < 1.2 * small
    assert more < 2_000_000
    data = data_of(html.render(large(1000)))
    assert len(data["total"]) < 2000
    assert data["left_out"] == 2000 - len(data["total"])


def test_an_empty_profile_is_no_fault():
    assert "</html>" in html.render(Profile(info={}, wall_ns=0, vcpus=[], exits=Exits([])))
    assert "</html>" in html.render(Profile(info={}, wall_ns=0, vcpus=[], exits=Exits([]), trace=lambda: iter(())))


# --- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def pictures(tmp_path):
    folder = Path(os.environ.get("HV_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def show(browser, tmp_path):
    """Open a profile's page; whatever the browser complains of or asks for fails the test at its end."""
    complaints, asked, opened = [], [], []

    def opener(profile, width=1280, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(html.render(profile))
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        opened.append((page, path.as_uri()))
        return page

    yield opener
    for page, _ in opened:
        page.wait_for_timeout(50)
        page.close()
    assert complaints == []
    assert set(asked) == {uri for _, uri in opened}


def column(page, title):
    """Return a column of the table, as shown."""
    titles = [text.strip(" ▾▴") for text in page.locator("#exits thead th").all_inner_texts()]
    place = titles.index(title) + 1
    return [text.split("\n")[0] for text in page.locator(f"#exits tbody td:nth-child({place})").all_inner_texts()]


def tip(page):
    return page.locator("#tip").inner_text()


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("trace", [True, False])
def test_it_fits_the_screen(show, pictures, width, scheme, trace):
    page = show(sample(trace=trace), width, scheme)
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=pictures / f"profile-{'trace' if trace else 'sums'}-{width}-{scheme}.png", full_page=True)
    outside = page.evaluate(
        """() => [...document.querySelectorAll("section > *, .bar > *, button:not(th button)")].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.width && (box.left < 0 || box.right > innerWidth + 0.5);
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []


@browser_only
def test_long_names_do_not_widen_it(show):
    profile = large(1000, kinds=30)
    profile.info["kernel"] = "k" * 500
    profile.marks = (("m" * 300, 10),)
    profile.notes = ("n" * 300,)
    page = show(profile, 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@browser_only
def test_sorting_by_click_and_by_key(show):
    page = show(sample())
    assert column(page, "Total") == ["2.55 ms", "1.08 ms", "685 us", "352 us", "2.65 us", "2.21 us"]
    page.get_by_role("button", name="Exits", exact=True).and_(page.locator("th button")).click()
    assert column(page, "Exits") == ["420", "410", "120", "20", "8", "3"]
    head = page.locator("th[aria-sort]")
    assert (head.inner_text().strip(" ▾"), head.get_attribute("aria-sort")) == ("Exits", "descending")
    page.keyboard.press("Enter")
    assert column(page, "Exits") == ["3", "8", "20", "120", "410", "420"]
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert page.locator("th[aria-sort]").inner_text().strip(" ▾") == "Address"
    assert column(page, "Address")[0] == "0xe0000014/1"


@browser_only
def test_filters(show):
    page = show(sample())
    page.get_by_label("Filter").fill("UART0 putchar")
    assert column(page, "Exit") == ["io uart0 THR out", "io uart0 LSR in"]
    assert page.locator("#matches").inner_text() == "2 of 7 kinds"
    page.get_by_label("Filter").fill("0x2f9")
    assert column(page, "Exit") == ["io 0x2f9 in"]
    page.get_by_label("Filter").fill("no such thing")
    assert page.locator("#exits tbody").inner_text() == "Nothing matches."
    page.get_by_label("Filter").fill("")
    page.get_by_label("Layer").select_option("kernel")
    assert column(page, "Exit") == ["npf"]
    page.get_by_label("Layer").select_option("")
    assert len(column(page, "Exit")) == 7
    page.locator("#vcpu").select_option("1")
    assert set(column(page, "vCPU")) == {"1"}
    assert sorted(column(page, "Exits"), key=int) == ["2", "10", "20", "20"]


@browser_only
def test_many_rows_are_shown_on_demand(show):
    page = show(large(1000, kinds=300))
    assert len(column(page, "Exit")) == 60
    page.get_by_role("button", name="Show all 300").click()
    assert len(column(page, "Exit")) == 300


@browser_only
def test_the_timeline_tells_zooms_and_hides(show, pictures):
    page = show(sample())
    box = page.locator("#timeline").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)
    assert " ms to " in tip(page)
    assert "/s" in tip(page)
    page.mouse.move(box["x"] + 300, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 110, steps=3)
    counted = int(re.search(r"exits\s+(\d+),", tip(page))[1])
    assert 50 < counted < 400  # of 981 on the whole width
    page.screenshot(path=pictures / "profile-brush.png")
    page.mouse.up()
    whole = page.get_by_role("button", name="Whole run")
    assert whole.is_enabled()
    assert "init </script>" not in page.locator("#timeline").text_content()
    page.mouse.move(box["x"] + 400, box["y"] + 110)
    page.screenshot(path=pictures / "profile-zoomed.png")
    whole.click()
    assert not whole.is_enabled()
    assert {"kernel", "init </script>"} <= set(page.locator("#timeline .mark-name").all_text_contents())
    shown = page.locator("#timeline path").count()
    page.get_by_role("button", name="uart0", exact=True).and_(page.locator("#legend button")).click()
    assert page.locator("#timeline path").count() == shown - 1
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 900, box["y"] + 110, steps=2)
    assert "pci" in tip(page)
    assert "uart0" not in tip(page)


@browser_only
def test_the_timeline_works_by_keys(show):
    page = show(sample())
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    first = tip(page)
    page.keyboard.press("ArrowRight")
    assert tip(page) != first
    for _ in range(4):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#unzoom").is_enabled()
    page.keyboard.press("Escape")
    assert not page.locator("#unzoom").is_enabled()


@browser_only
def test_the_heat_map_is_drawn_and_tells(show):
    page = show(sample())
    colours = """() => { const canvas = document.getElementById("heat");
            const data = canvas.getContext("2d").getImageData(60, 8, canvas.width - 70, canvas.height - 40).data;
            const colours = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3]) colours.add(data.slice(i, i + 3).join());
            return colours.size; }"""
    page.wait_for_function(f"({colours})() > 3", timeout=60_000)
    page.locator("#heat").scroll_into_view_if_needed()
    box = page.locator("#heat").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    assert re.search(r"took [\d.]+ [mun]?s to", tip(page))
    assert "any time" in tip(page)


@browser_only
def test_the_flame_graph_zooms_tells_and_weighs(show, pictures):
    page = show(sample())
    frame = page.locator(".frame", has_text="uart0").first
    narrow = frame.bounding_box()["width"]
    frame.click()
    assert page.locator("#path").inner_text() == INTO.join(("vCPU 0", "io", "uart0"))
    wide = page.locator(".frame", has_text="uart0").bounding_box()["width"]
    assert wide > 2 * narrow
    assert page.locator(".frame", has_text="pci").count() == 0
    page.locator(".frame", has_text="LSR in").hover()
    assert INTO.join(("vCPU 0", "io", "uart0", "LSR in")) in tip(page)
    assert "handler time\t651 us" in tip(page)
    assert "hv (user)" in tip(page)
    page.screenshot(path=pictures / "profile-flame.png")
    page.locator("#by-count").click()
    page.locator(".frame", has_text="LSR in").hover()
    assert "exits\t400" in tip(page)
    page.get_by_role("button", name="Show all").click()
    assert page.locator("#path").inner_text() == ""
    frames = {name: page.locator(".frame", has_text=name).first for name in ("all", "vCPU 0", "vCPU 1")}
    widths = {name: frame.bounding_box()["width"] for name, frame in frames.items()}
    assert widths["vCPU 0"] / widths["all"] == pytest.approx(929 / 981, rel=0.01)
    assert widths["vCPU 1"] / widths["all"] == pytest.approx(52 / 981, rel=0.02)


@browser_only
def test_layers_are_not_added_up(show):
    page = show(sample())
    assert page.locator(".frame", has_text="npf").count() == 0
    page.get_by_role("button", name="KVM (kernel)").click()
    assert page.locator(".frame").all_inner_texts() == ["all", "npf"]
    assert page.locator("#kernel-hint").is_visible()
    page.locator(".frame", has_text="npf").hover()
    assert "KVM (kernel)" in tip(page)
    page.get_by_role("button", name="hv (user)").click()
    assert page.locator(".frame", has_text="uart0").count() > 0
    assert not page.locator("#kernel-hint").is_visible()
    assert not show(sample(kernel_layer=False)).locator("#whose").is_visible()


@browser_only
def test_the_flame_graph_works_by_keys(show):
    page = show(sample())
    page.locator("#flame-up").evaluate("element => element.disabled = false")
    page.locator("#flame-up").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("all, ")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("vCPU 0, ")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused).startswith("vCPU 1, 223 us")
    page.keyboard.press("Enter")
    assert page.locator("#path").inner_text() == "vCPU 1"
    page.keyboard.press("Escape")
    assert page.locator("#path").inner_text() == ""


@browser_only
def test_frames_add_up(show):
    page = show(sample())
    sums = page.evaluate(
        """() => { const check = (at) => !at.under.size
            || Math.abs([...at.under.values()].reduce((sum, each) => sum + each.value, 0) - at.value) < 1e-6 * at.value
            && [...at.under.values()].every(check);
          return [check(flame.root), flame.root.value]; }"""
    )
    assert sums[0]
    assert sums[1] == pytest.approx(sum(row.handler.total for row in sample().exits.layer("user")), rel=1e-3)


@browser_only
def test_notes_facts_and_counters(show):
    page = show(sample())
    assert page.locator("h1").inner_text() == "Profile of debian <6.1>"
    assert page.title() == "hv profile: debian <6.1>"
    assert "RAM (MiB)\n256" in page.locator("#facts").inner_text()
    assert "in-kernel exits are not joined in" in page.locator("#notes").inner_text()
    assert page.locator("#kvm tbody tr").count() == 4
    assert "remote_tlb_flush" in page.locator("#kvm").inner_text()


@browser_only
def test_hostile_names_run_nothing(show):
    evil = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
    row = ExitRow(*("user", "io", evil, evil, 1, "in", 1, 0, 9, 9), Histogram.of([9] * 9), Histogram(), {evil: 1})
    profile = Profile(
        info={"kernel": evil, evil: evil},
        wall_ns=1000,
        vcpus=[VcpuTimes(0, 9, 1, 1, 1)],
        exits=Exits([row]),
        kvm={evil: {evil: 1}},
        marks=[(evil, 5)],
        notes=[evil],
    )
    page = show(profile)
    page.locator(".frame").last.hover()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


@browser_only
def test_a_trace_without_anything_in_it(show):
    page = show(Profile(info={}, wall_ns=0, vcpus=[], exits=Exits([]), trace=lambda: iter(())))
    assert "Nothing matches" in page.locator("#exits").inner_text()


@browser_only
def test_everything_that_acts_has_a_name(show):
    page = show(sample())
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex], canvas")].filter((element) =>
            !(element.getAttribute("aria-label") || element.innerText.trim() || element.labels?.length)
        ).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []


CONTRAST = """() => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = rgb(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255];
  };
  const ratio = (element) => {
    const both = [light(rgb(getComputedStyle(element).color)), light(behind(element))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  };
  const left_out = "svg, .above, :disabled, [hidden], script";
  return [...document.querySelectorAll("body *")]
    .filter((element) => !element.closest(left_out))
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((element) => ratio(element) < 4.5).map((element) => [ratio(element), element.outerHTML.slice(0, 70)]);
}"""


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show, scheme):
    """WCAG 2.1, 1.4.3: at least 4.5 to 1."""
    assert show(sample(), scheme=scheme).evaluate(CONTRAST) == []


@browser_only
def test_a_large_profile_is_drawn_in_time(show):
    start = time.monotonic()
    page = show(large(300_000))
    page.locator(".frame").nth(10).wait_for(state="attached", timeout=60_000)
    assert time.monotonic() - start < 60  # a page that hangs, not one that is slow
