"""The pages in a real Chromium: light, dark and phone, by keyboard, without scripts."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from support.helpers import write_images
from support.servers import serving

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, look_over
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

WAIT = 30.0
PHONE, DESK = (360, 800), (1280, 900)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; these tests are skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        service = webdriver.ChromeService(driver)
        browser = webdriver.Chrome(options=options, service=service)
        try:
            yield browser
        finally:
            browser.quit()


@pytest.fixture(scope="module")
def cache(tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled set with images, a large one of which nothing is stored, a damaged one."""
    folder = tmp_path_factory.mktemp("browser")
    rng = np.random.default_rng(0)
    for name in ("apple", "bear"):
        write_images(folder / "p/train" / name, rng.integers(0, 256, (6, 24, 24, 3), np.uint8))
    views = Views(open_target(str(folder / "p")), parse_policy("pad-crop-flip"))
    made = {"tiny": {"target": str(folder / "p")}}
    options = StageOptions(batch_size=4, workers=0, shard_rows=4, provenance=made)
    cache_teachers(views, [tiny], parse_encoding("f32"), 2, folder / "c", options)
    (label_set,) = list_label_sets(folder / "c")
    label_set.commit_path(label_set.shard(1, 1)).unlink()
    spec = label_set.spec | {"target": label_set.spec["target"] | {"name": "n" * 60, "size": 9000}}
    create_label_set(folder / "c", spec, label_set.classes, 40, shard_rows=512).close()
    (folder / "c" / "damaged").mkdir()
    (folder / "c" / "damaged" / "zarr.json").write_text("{")
    return folder / "c"


@pytest.fixture(scope="module")
def url(cache: Path) -> Iterator[str]:
    with serving(cache) as address:
        yield address


@pytest.fixture(scope="module")
def small(cache: Path) -> str:
    """Name of the set with images."""
    return next(s.name for s in look_over(cache)[0] if s.samples == 12)


Show = Callable[..., Any]


@pytest.fixture
def show(chromium: Any, url: str) -> Iterator[Show]:
    """Opens a page in a size and colour scheme, with scripts or without."""

    def opened(path: str, size: tuple[int, int] = DESK, dark: bool = False, js: bool = True) -> Any:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not js})
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", metrics | {"mobile": size == PHONE}
        )
        chromium.get_log("browser")
        chromium.get(url + path)
        keep = os.environ.get("SSKT_TEST_SHOTS")
        if keep:
            words = "".join(c if c.isalnum() else "-" for c in path) or "-"
            name = f"{words[:40]}-{size[0]}-{'dark' if dark else 'light'}.png"
            chromium.save_screenshot(str(Path(keep) / name))
        return chromium

    yield opened
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


CONTRAST = """
const channels = (text) => text.match(/[0-9.]+/g).map(Number);
const luminance = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const over = (top, below) => {
  const a = top[3] ?? 1;
  return [0, 1, 2].map((i) => top[i] * a + below[i] * (1 - a));
};
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    layers.push(channels(getComputedStyle(e).backgroundColor));
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const found = [];
let seen = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  seen++;
  const back = behind(element);
  const text = over(channels(getComputedStyle(element).color), back);
  const [light, dark] = [luminance(text), luminance(back)].sort((a, b) => b - a);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < 4.5) found.push([ratio, walker.currentNode.data.trim().slice(0, 40)]);
}
return [seen, found];
"""

PAGES = ["/", "/?q=nothing", "/sets/{}", "/sets/{}/samples/5?seed=1", "/sets/none"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("path", PAGES)
def test_pages_fit_and_can_be_read(path: str, dark: bool, show: Show, small: str) -> None:
    for size in (DESK, PHONE):
        browser = show(path.format(small), size, dark)
        browser.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
        wide, room = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= room == size[0]
        seen, faint = browser.execute_script(CONTRAST)
        assert seen > 10 and faint == []
        back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back[4:-1].split(","))) < 200) == dark
        missing = "/sets/none" in path
        said = [e for e in browser.get_log("browser") if not (missing and "404" in e["message"])]
        assert said == [], "nothing is forbidden by the policy, nothing failed"
    images = "return [...document.images].map((i) => [i.complete, i.naturalWidth])"
    if "samples" in path:
        assert browser.execute_script(images) == [[True, 312]]


REACHED = "return [document.activeElement.tagName, document.activeElement.textContent.trim()]"
VISIBLE = """
const style = getComputedStyle(document.activeElement);
return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
"""


@pytest.mark.parametrize("path", ["/", "/sets/{}/samples/5?seed=1"])
def test_the_keyboard_reaches_everything_in_order(path: str, show: Show, small: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = show(path.format(small))
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('a[href], button, input, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility()).map((e) => [e.tagName, e.textContent.trim()])"
    )
    body = browser.switch_to.active_element
    reached = []
    for _ in wanted:
        body.send_keys(Keys.TAB)
        reached.append(browser.execute_script(REACHED))
        assert browser.execute_script(VISIBLE), reached[-1]
        body = browser.switch_to.active_element
    assert reached == wanted
    assert wanted[0] == ["A", "Skip to content"]


def test_the_page_can_be_read_without_scripts(show: Show, small: str) -> None:
    browser = show("/", js=False)
    assert small in browser.find_element("css selector", ".cards").text
    assert not browser.find_element("id", "pause").is_displayed()
    browser.find_element("css selector", f"a[href*='/sets/{small}/samples/0']").click()
    assert "Sample 0, seed 0" in browser.find_element("tag name", "h1").text
    browser.find_element("css selector", "a[rel=next]").click()
    field = browser.find_element("name", "row")
    field.clear()
    field.send_keys("7")
    field.submit()
    until(lambda: "Sample 7, seed 0" in browser.find_element("tag name", "h1").text)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while True:
        # The page may be replaced between finding an element and reading it.
        with contextlib.suppress(StaleElementReferenceException):
            if true():
                return
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_page_follows_what_happens_and_keeps_what_is_open(
    show: Show, small: str, cache: Path
) -> None:
    browser = show("/")
    digest = small[-12:]
    browser.execute_script(f"document.getElementById('spec-{digest}').open = true")
    browser.execute_script(f"document.querySelector('#spec-{digest} summary').focus()")
    (label_set,) = [s for s in look_over(cache)[0] if s.name == small]
    commit = label_set.commit_path(label_set.shard(1, 1))
    shutil.copy(label_set.commit_path(label_set.shard(1, 0)), commit)

    def whole() -> bool:
        # As when one comes back to the page: it does not wait for its clock then.
        browser.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
        words = browser.execute_script("return document.querySelector('.cards').textContent")
        return "2 seeds, all whole" in words

    try:
        until(whole)
    finally:
        commit.unlink()
    assert browser.execute_script(f"return document.getElementById('spec-{digest}').open")
    focused = "return document.activeElement.closest('details')?.id"
    assert browser.execute_script(focused) == f"spec-{digest}"

    browser.find_element("id", "pause").click()
    assert browser.find_element("id", "connection").text == "Paused."
    assert browser.find_element("id", "pause").text == "Go on"
    assert browser.get_log("browser") == []


def test_a_server_that_is_gone_is_told(show: Show, cache: Path, chromium: Any) -> None:
    with serving(cache) as address:
        show("/")
        chromium.get(address)
        assert chromium.find_element("id", "connection").text == ""
    until(lambda: "No answer" in chromium.find_element("id", "connection").text)
    chromium.get_log("browser")
