"""The report's page in headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vitarium.benchmarks import page, record
from vitarium.benchmarks.record import Machine, Record

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

MACHINE = Machine("cpu", "Example CPU", 4, 1, "Linux x86_64")
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
MODELS = {  # latency in ms, GFLOPs, parameters in millions
    "alpha_tiny": (10, 3.0, 9),
    "beta_tiny": (20, 2.0, 8),
    "gamma_tiny": (40, 1.0, 7),
    "delta_tiny": (100, 4.0, 30),
    EVIL: (200, 5.0, 40),
}
TESTBED = {"window": (0.98, 1e-3), "global": (0.99, 2e-3), "linear": (0.95, 3e-3)}


def _made(median: float, **fields) -> Record:
    fields = {
        "kind": "model",
        "implementation": "eager",
        "mode": "forward",
        "dtype": "float32",
        "shapes": {"input": [1, 3, 224, 224]},
        "arguments": {},
        "machine": MACHINE,
        **fields,
    }
    return record.measured(samples={"cpu": [median, 1.01 * median]}, clock="cpu", **fields)


def _models() -> list[Record]:
    return [
        _made(ms / 1e3, name=name, macs=int(1e9 * gflops), params=int(1e6 * params), mode=mode)
        for name, (ms, gflops, params) in MODELS.items()
        for mode in ("forward", "training")
    ]


def _operators() -> list[Record]:
    return [
        _made(
            median / 1e3,
            kind="operator",
            name=name,
            implementation=implementation,
            shapes={"query": [4, 7, 7, 2, 32]},
            case=f"{name} heads 2",
            error=1e-7,
        )
        for name in ("window_attention", "agent_attention")
        for implementation, median in (("torch", 1), ("gather", 4))
    ]


def _mixers() -> list[Record]:
    return [
        _made(
            1e-9 * side**power,
            kind="mixer",
            name=name,
            implementation="vitarium",
            shapes={"x": [1, side, side, 32]},
            case=f"{side}x{side}",
        )
        for name, power in (("window", 2), ("global", 4))
        for side in (16, 32, 64)
    ]


def _testbed() -> list[Record]:
    shared = {
        "shapes": {"input": [64, 3, 32, 32]},
        "arguments": {"model": "testbed_nano", "model_kwargs": {}, "data": "digits"},
    }
    found = []
    for name, (accuracy, median) in TESTBED.items():
        found += [
            _made(median, name=name, macs=10, mode=mode, **shared)
            for mode in ("forward", "training")
        ]
        for seed in (0, 1):
            run = {"kind": "run", "implementation": "trained", "mode": "training"}
            found.append(
                _made(9, name=name, seed=seed, accuracy=accuracy + 1e-3 * seed, **run, **shared)
            )
    return found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("page")
    Image.new("RGB", (4, 4), "red").save(folder / "mixer_atlas.png")
    records = {"models.jsonl": [*_models(), *_testbed()], "others.jsonl": _operators() + _mixers()}
    kernels = [{"kernel": "window", "target": f"cuda:{sm}", "registers": 2 * sm} for sm in (80, 90)]
    text = page.page(records, kernels=kernels, images=[folder / "mixer_atlas.png"])
    (folder / "report.html").write_text(text, encoding="utf-8")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += [
        f"--disable-{part}" for part in ("background-networking", "component-update", "sync")
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address: str) -> Iterator:
    """Opens the page; whatever it complains of or asks for beyond its file fails the test."""
    pages, complaints = [], []

    def open_page(**options):
        tab = browser.new_page(
            viewport=options.pop("viewport", {"width": 1200, "height": 900}), **options
        )
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "request",
            lambda r: r.url == address or r.url.startswith("data:") or complaints.append(r.url),
        )
        tab.set_default_timeout(30_000)
        tab.goto(address)
        pages.append(tab)
        return tab

    yield open_page
    for tab in pages:
        tab.close()
    assert complaints == []


def _names(tab, section: str) -> list[str]:
    """The names in the rows that a section's table shows, in order."""
    return tab.eval_on_selector_all(
        f"#{section} tbody tr", "rows => rows.filter(r => r.checkVisibility())"
        ".map(r => r.querySelector('th').textContent)"
    )  # fmt: skip


def _heading(tab, section: str, label: str):
    return tab.locator(f"#{section} thead th", has=tab.locator(f"button:text-is('{label}')"))


def _control(tab, label: str):
    return tab.locator("#scatter-controls").get_by_label(label)


def _marks(tab) -> dict[str, str]:
    """Where the scatter's marks are, by name."""
    places = "i => [i.dataset.name, i.querySelector('.mark').getAttribute('transform')]"
    return dict(tab.eval_on_selector_all("#scatter .item", f"items => items.map({places})"))


def test_it_opens_from_disk_and_shows_names_as_they_are(opened):
    tab = opened()
    assert tab.title() == "Vitarium: what was measured"
    assert tab.evaluate("window.evil") is None and not tab.query_selector("img[src=x]")
    _control(tab, "Points").select_option("1")
    assert EVIL in _names(tab, "records") and EVIL in _marks(tab)
    assert tab.locator("#pictures img").evaluate("image => image.naturalWidth") == 4
    assert tab.locator("#kernels tbody tr").count() == 2
    assert tab.evaluate("[...document.querySelectorAll('thead th')].every(h => h.scope === 'col')")
    for nodes, named in (("select, input", "n.labels[0]"), ("table", "n.caption")):
        assert tab.eval_on_selector_all(nodes, f"all => all.every(n => {named}.textContent.trim())")


def test_sorting_changes_the_order_and_says_so(opened):
    tab = opened()
    tab.get_by_label("Filters: Records").get_by_label("kind").select_option("=model")
    heading = _heading(tab, "records", "params, M")
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    ordered = _names(tab, "records")
    assert ordered[0] == "gamma_tiny" and ordered.index("beta_tiny") < ordered.index("delta_tiny")
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").click()
    assert _names(tab, "records")[0] == EVIL, "rows without a value stay last"
    assert heading.get_attribute("aria-sort") == "descending"
    assert _names(tab, "records")[-1] in TESTBED
    _heading(tab, "records", "name").get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "none"


def test_filters_change_what_is_shown(opened):
    tab = opened()
    everything = len(_names(tab, "records"))
    filters = tab.get_by_label("Filters: Records")
    filters.get_by_label("kind").select_option("=mixer")
    assert set(_names(tab, "records")) == {"window", "global"}
    filters.get_by_label("text").fill("GLOBAL 32x32")
    tab.locator("#records .count", has_text=f"1 of {everything} rows").wait_for()
    assert _names(tab, "records") == ["global"]
    assert f"1 of {everything} rows: kind mixer" in tab.inner_text("#records .count")
    filters.get_by_role("button").click()
    assert len(_names(tab, "records")) == everything
    for label, choice in (("mode", "training"), ("dtype", "float32"), ("name", "alpha_tiny")):
        box = filters.get_by_label(label, exact=True)
        if box.count():
            box.select_option(f"={choice}")
    assert _names(tab, "records") == ["alpha_tiny"]


def test_axes_move_the_marks_and_the_front(opened):
    tab = opened()
    _control(tab, "Points").select_option("1")
    assert "Models" in _control(tab, "Points").locator("option:checked").inner_text()
    _control(tab, "Horizontal axis").select_option("forward")
    _control(tab, "Vertical axis").select_option("gflops")
    before, path = _marks(tab), tab.get_attribute("#scatter .front", "d")
    assert "front: alpha_tiny, beta_tiny, gamma_tiny." in tab.inner_text("#scatter-caption")
    _control(tab, "Horizontal axis").select_option("params")
    assert "front: gamma_tiny." in tab.inner_text("#scatter-caption")
    assert tab.get_attribute("#scatter .front", "d") != path
    assert _marks(tab).keys() == before.keys() and _marks(tab) != before
    _control(tab, "Horizontal axis").select_option("throughput")  # more is better
    _control(tab, "Vertical axis").select_option("params")
    assert "front: alpha_tiny, beta_tiny, gamma_tiny." in tab.inner_text("#scatter-caption")


def test_the_testbed_has_accuracies_and_colours(opened):
    tab = opened()
    assert "Testbed" in tab.locator("#scatter-controls option:checked").first.inner_text()
    assert "front: window, global." in tab.inner_text("#scatter-caption")
    assert tab.locator("#scatter-legend li").count() == len({"local", "pooled", "linear"})
    colours = tab.eval_on_selector_all(
        "#scatter .mark", "marks => marks.map(m => getComputedStyle(m).fill)"
    )
    assert len(set(colours)) == 3
    tab.locator("#scatter [data-name=global] .mark").hover()
    assert "top-1 accuracy, %: 99.05 ± 0.64" in tab.inner_text("#scatter .tip")


def test_keyboard_alone_sorts_switches_and_walks_through_marks(opened):
    tab = opened()
    _heading(tab, "records", "median, ms").get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert _heading(tab, "records", "median, ms").get_attribute("aria-sort") == "ascending"
    _control(tab, "Points").focus()
    tab.keyboard.press("Tab")
    before = _control(tab, "Horizontal axis").input_value()
    tab.keyboard.press("ArrowDown")
    assert _control(tab, "Horizontal axis").input_value() != before
    for _ in range(3):
        tab.keyboard.press("Tab")
    described = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
        label = tab.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label.split(", ")[0] == tab.inner_text("#scatter .tip b")
        described.append(label)
    assert described[1] == described[3] and len(set(described)) == 3
    assert all("top-1 accuracy, %:" in label and "±" in label for label in described)
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#scatter .tip")


def test_peers_and_growth(opened):
    tab = opened()
    assert "of 2 settings ours is faster in 2" in tab.inner_text("#peers .verdicts")
    labels = tab.eval_on_selector_all(
        "#strips .item", "i => i.map(e => e.getAttribute('aria-label'))"
    )
    assert len(labels) == 2 and all("faster than gather: 0.25 of its time" in t for t in labels)
    exponents = dict(
        zip(
            _names(tab, "growth"),
            tab.locator("#growth tbody td.number:nth-child(3)").all_inner_texts(),
        )
    )
    assert exponents == {"window": "1.00 ± 0.00", "global": "2.00 ± 0.00"}
    tab.locator("#growth tbody tr", has_text="global").hover()
    assert tab.get_attribute("#curves .item.on", "data-name") == "global"


def test_a_narrow_window_does_not_overflow(opened):
    tab = opened(viewport={"width": 360, "height": 740})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert (
        tab.evaluate("document.querySelector('#scatter svg').getBoundingClientRect().right") <= 360
    )
    tab.set_viewport_size({"width": 1000, "height": 740})
    tab.wait_for_selector("#scatter svg[viewBox^='0 0 9']")


def test_dark_mode_changes_the_colours(opened):
    def colours(scheme):
        tab = opened(color_scheme=scheme)
        return tab.evaluate(
            "['backgroundColor', 'color'].map(c => getComputedStyle(document.body)[c])"
        )

    (light, dark_ink), (dark, light_ink) = colours("light"), colours("dark")
    brightness = [sum(map(int, c[4:-1].split(", "))) for c in (light, light_ink, dark, dark_ink)]
    assert min(brightness[:2]) > 600 and max(brightness[2:]) < 120


def test_print_shows_everything_and_no_controls(opened):
    tab = opened()
    tab.emulate_media(media="print")
    tab.wait_for_selector("details:not([open])", state="detached")
    for control in ("nav", ".filters", "select", "input", "summary"):
        assert not tab.evaluate(
            f"[...document.querySelectorAll('{control}')].some(c => c.checkVisibility())"
        ), control
    assert tab.evaluate("[...document.querySelectorAll('table')].every(t => t.checkVisibility())")
    assert tab.eval_on_selector("#records .scroll", "s => getComputedStyle(s).maxHeight") == "none"
    tab.emulate_media(media="screen")
    tab.wait_for_selector("details[open]", state="detached")
    assert tab.locator("details.set:visible").count() == 1
