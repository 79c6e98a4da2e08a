"""The status page and the sample browser: what they say is what is stored, and nothing else."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support.helpers import TINY, write_images
from support.pages import Node, faults, parse

from sskt.server.app import create_app
from sskt.server.http.tokens import new_token
from sskt.server.pages.coverage import Coverage, CoverageCache, coverage_of
from sskt.server.pages.drawing import drawn, percent
from sskt.server.pages.pages import coded, duration, number, size
from sskt.server.pages.samples import OPEN, Opened
from sskt.server.pages.status import RECENT_SECONDS, Recent
from sskt.server.settings import Settings
from sskt.server.state import State
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.verify import stored_probabilities
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

HTML = {"Accept": "text/html,application/xhtml+xml"}
EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
CONTROLS = "\x1b[\x9b2\x7fJ\u202ex\0y\x08"
"""Clears a terminal, turns the direction of writing, ... in every second character."""


@pytest.fixture(scope="module")
def stock(tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, 3 classes x 10 PNGs of 24x24 pixels, and a cache over it.

    One source in two encodings, 3 seeds and 2, shards of 8 rows, of which two are missing.
    """
    folder = tmp_path_factory.mktemp("stock")
    rng = np.random.default_rng(0)
    for name in ("apple", "bear", "<b>cup&"):
        pixels = rng.integers(0, 256, (10, 24, 24, 3), np.uint8)
        write_images(folder / "images" / "train" / name, pixels)
    views = Views(open_target(str(folder / "images")), parse_policy("pad-crop-flip"))
    options = stage_options(folder / "images", "tiny")
    for encoding, seeds in (("f32", 3), ("u8", 2)):
        cache_teachers(views, [tiny], parse_encoding(encoding), seeds, folder / "cache", options)
    first = of_encoding(folder / "cache", "f32")
    for seed, block in ((1, 3), (2, 0)):
        for key in first.shard_keys(first.shard(seed, block)):
            (first.path / key).unlink()
    return folder


@pytest.fixture
def images(stock: Path) -> Iterator[Path]:
    """The images, put back after the test."""
    shutil.copytree(stock / "images", stock / "kept")
    yield stock / "images"
    shutil.rmtree(stock / "images")
    (stock / "kept").rename(stock / "images")


@pytest.fixture
def cache(stock: Path, tmp_path: Path) -> Path:
    """A copy of the cache."""
    shutil.copytree(stock / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def stage_options(images: Path, source: str) -> StageOptions:
    made = {source: {"target": str(images)}}
    return StageOptions(batch_size=8, workers=0, shard_rows=8, provenance=made)


def of_encoding(cache: Path, name: str) -> LabelSet:
    (found,) = [s for s in list_label_sets(cache) if str(s.encoding) == name]
    return found


@pytest.fixture
def client(tmp_path: Path) -> Callable[..., TestClient]:
    def make(cache: Path, **changes: Any) -> TestClient:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        app = create_app(Settings(cache=str(cache), run=str(run), **changes))
        return TestClient(app, headers=HTML, follow_redirects=False, base_url="http://localhost")

    return make


SETTINGS = Settings(cache="", run="")
LINKS = {"href", "src", "action"}


def state_of(client: TestClient) -> State:
    app: Any = client.app
    return app.state  # type: ignore[no-any-return]  # the gate's


def get(client: TestClient, url: str, status: int = 200) -> Node:
    """A page, checked for what every page must have."""
    answer = client.get(url)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = parse(answer.text)
    assert faults(page) == []
    for node in page.all():
        for name in LINKS & node.attributes.keys():
            assert not node.attributes[name].startswith("/"), "links hold under any path prefix"
            node.attributes[name] = urljoin(url, node.attributes[name])
    return page


def facts(node: Node) -> dict[str, str]:
    pairs = zip(node.all("dt"), node.all("dd"), strict=True)
    return {key.text: value.text for key, value in pairs}


def test_the_page_says_what_the_store_holds(cache: Path, client: Callable[..., TestClient]) -> None:
    page = get(client(cache), "/")
    sets = list_label_sets(cache)
    summaries = page.all("article")
    assert [summary.one("h3").text for summary in summaries] == [s.name for s in sets]
    for summary, label_set in zip(summaries, sets, strict=True):
        shown = facts(summary.one("dl"))
        assert shown["Target"] == "images train, 30 samples"
        assert shown["Source"] == "tiny (tiny:build), 12 classes"
        assert shown["Views"] == "pad-crop-flip (padding 4)"
        assert shown["Encoding"] == str(label_set.encoding)
        assert shown["Stored"] == size(label_set.stored_bytes())
        error = label_set.attributes["error"]
        assert shown["Gradient error"] == (
            f"{error['T=1']['gradient']:.2g} at T=1, {error['T=3']['gradient']:.2g} at T=3"
        )
        assert summary.one("code", title=label_set.digest).text == label_set.digest[:12]
        assert label_set.digest in summary.one("details").text
        assert label_set.spec["source"]["weights"] in summary.one("details").text
        rows = summary.one("table").one("tbody").all("tr")
        assert [row.all("td")[1].text for row in rows] == [percent(c) for c in label_set.coverage()]
    shown_words = [summary.one("caption").text for summary in summaries]
    assert sorted(shown_words) == [
        "1 of 3 seeds whole; seeds 1-2 incomplete",
        "2 seeds, all whole",
    ]


def test_what_is_drawn_is_what_is_stored(cache: Path, client: Callable[..., TestClient]) -> None:
    label_set = of_encoding(cache, "f32")
    page = get(client(cache), f"/sets/{label_set.name}")
    rows = page.one("table").one("tbody").all("tr")
    for seed, row in enumerate(rows):
        stored = [label_set.has(label_set.shard(seed, b)) for b in range(label_set.blocks)]
        image = row.one("svg")
        assert image.attributes["aria-label"] == f"{sum(stored)} of 4 blocks stored"
        assert cells(image.one("path", class_="stored").attributes["d"], 4) == stored


def cells(path: str, blocks: int) -> list[bool]:
    """The unit cells whose middle lies in one of the path's rectangles."""
    spans = []
    for part in path.split("M")[1:]:
        start, rest = part.split(",")
        width = rest.split("h")[1].split("v")[0]
        spans.append((float(start), float(start) + float(width)))
    return [any(a <= 100 * b + 50 < stop for a, stop in spans) for b in range(blocks)]


@pytest.mark.parametrize(("seeds", "blocks"), [(1, 1), (16, 65), (17, 64), (200, 300)])
def test_large_drawings_are_small_and_right(seeds: int, blocks: int) -> None:
    rng = np.random.default_rng(0)
    stored = rng.random((seeds, blocks)) < np.linspace(1.5, 0, blocks)
    drawing = drawn(Coverage(stored, stored.mean(1), 0))
    paths = [row.paths for row in drawing.rows] or [drawing.paths]
    assert sum(len(path) for each in paths for path in each.values()) < 120_000
    assert len(drawing.rows) == (seeds if seeds <= 16 else 0)
    assert 0 < drawing.height <= 64 * 100
    assert (drawing.width + 12) // 100 >= min(blocks, 64) - 1
    whole = drawn(Coverage(np.ones_like(stored), np.ones(seeds), 0))
    for each in [row.paths for row in whole.rows] or [whole.paths]:
        assert list(each) == ["stored"]
    none = drawn(Coverage(np.zeros_like(stored), np.zeros(seeds), 0))
    assert not any(row.paths for row in none.rows) and not none.paths


def test_a_survey_counts_what_the_store_counts(cache: Path) -> None:
    for label_set in list_label_sets(cache):
        found = coverage_of(label_set)
        assert found.shares.tolist() == pytest.approx(label_set.coverage())
        assert found.bytes == label_set.stored_bytes()
        assert found.stored.sum() == sum(
            label_set.has(shard) for shard in label_set.shards(range(label_set.seeds))
        )


class SlowStorage:
    """A place that does not answer for now, as a bucket may, and then not at all."""

    name = "slow"
    answer = threading.Event()

    def refresh(self) -> None:
        self.answer.wait(60)
        raise InputError("the bucket is gone")


def test_a_place_that_does_not_answer_keeps_no_page_waiting(cache: Path) -> None:
    good, slow = list_label_sets(cache)
    place: Any = SlowStorage()
    stuck = replace(slow, storage=place)
    coverages = CoverageCache(patience=0.2)
    assert isinstance(coverages.of([good])[0], Coverage)
    assert coverages.of([stuck]) == [None]
    found = coverages.of([good, stuck])
    assert isinstance(found[0], Coverage) and found[1] is None, "what is known is shown"
    place.answer.set()
    coverages.patience = 30
    assert coverages.of([stuck]) == ["the bucket is gone"]


def test_a_new_shard_is_seen_after_some_seconds_and_not_at_once(cache: Path) -> None:
    now = [0.0]
    coverages = CoverageCache(lambda: now[0], patience=30)
    label_set = of_encoding(cache, "u8")

    def stored() -> int:
        (found,) = coverages.of([label_set])
        assert isinstance(found, Coverage)
        return int(found.stored.sum())

    assert stored() == 8
    label_set.commit_path(label_set.shard(0, 0)).unlink()
    assert stored() == 8, "kept"
    now[0] += 2.5
    coverages.of([label_set])
    coverages.settle()
    assert stored() == 7


def test_the_numbers_are_those_that_were_counted(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    browser = client(cache)
    metrics = state_of(browser).metrics
    for _ in range(60):
        metrics.request("/zarr/{path}", "GET", 200, 0.02, 1024)
    metrics.labels(list_label_sets(cache)[0].name, 120_000)
    for hit in (True, True, True, False):
        metrics.decoded(hit)
    metrics.error("overloaded", "64 requests at once", "req-1")
    page = get(browser, "/")
    figures = {
        div.one("dt").text: [dd.text for dd in div.all("dd")]
        for div in page.one("dl", class_="figures").all("div")
    }
    assert figures["Labels"][1] == "120,000 ever"
    assert figures["Sent"][1] == "60.0 KiB ever"
    assert figures["Requests"][1] == "0 being served, 60 ever"
    assert figures["Latency"] == ["18 ms median", "p95 24 ms, p99 25 ms"]
    assert figures["Labels already decoded"] == ["75 % hits", "75 % ever"]
    assert figures["Labels"][0] in {f"{number(120_000 / s)} /s" for s in np.arange(1, 20, 0.001)}
    route = page.one("table", class_="numbers").one("tbody").one("tr")
    assert route.text.startswith("/zarr/{path} 60 60.0 KiB")
    error = page.one("ol", class_="errors").one("li")
    assert error.text.startswith("overloaded 20") and "req-1" in error.text
    assert error.all("p")[1].text == "64 requests at once"


@given(st.lists(st.tuples(st.floats(1, 90), st.integers(0, 5)), min_size=1, max_size=30))
def test_the_last_minute_or_since_the_last_look(looks: list[tuple[float, int]]) -> None:
    now = [1000.0]
    recent, counted = Recent(now[0], lambda: now[0]), [(now[0], 0)]
    for wait, more in looks:
        now[0] += wait
        total = counted[-1][1] + more
        seconds, counts = recent.since(np.array([total], np.int64))
        lately = [c for c in counted if now[0] - c[0] <= RECENT_SECONDS] or counted[-1:]
        assert seconds == pytest.approx(now[0] - lately[0][0])
        assert counts.tolist() == [total - lately[0][1]]
        counted.append((now[0], total))
    assert len(recent._looks) <= RECENT_SECONDS + 1


def test_the_live_parts_are_those_of_the_page(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    browser = client(cache)
    page, live = get(browser, "/"), parse(browser.get("/status/live").text)
    parts = [node.attributes["id"] for node in page.all() if "data-live" in node.attributes]
    assert parts == [n.attributes["id"] for n in live.all() if "data-live" in n.attributes]
    assert page.one(id="live-sets").text == live.one(id="live-sets").text
    found = get(browser, "/?q=" + of_encoding(cache, "u8").digest[:8])
    assert [a.one("h3").text for a in found.all("article")] == [of_encoding(cache, "u8").name]
    nothing = get(browser, "/?q=<b>")
    assert not nothing.all("article") and "“<b>”" in nothing.text


def test_what_is_being_computed_is_shown(cache: Path, client: Callable[..., TestClient]) -> None:
    browser = client(cache, on_demand=True, queue=30)
    label_set = of_encoding(cache, "f32")
    queue = state_of(browser).on_demand
    assert queue is not None
    assert get(browser, "/").one(id="live-queue").text.startswith("Computing on demand 0 waiting")
    for block in range(23):
        queue.ask(label_set.name, 2, block)
    shown = get(browser, "/").one(id="live-queue")
    words = "23 waiting, at most 30; since the start 0 shards computed, 0 failed"
    assert shown.one("p").text == words
    lines = [li.text for li in shown.all("li")]
    assert lines[0].startswith(f"queued {label_set.name}, seed 2, block 0 for")
    assert len(lines) == 21 and lines[-1] == "and 3 more"
    assert get(client(cache), "/").one(id="live-queue").text == ""


def test_tokens_are_listed_with_their_last_use(
    cache: Path, tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    tokens = tmp_path / "tokens.json"
    used = new_token(tokens, "lab", ["compute"], None)
    new_token(tokens, "spare", ["read"], None)
    browser = client(cache, token_file=str(tokens))
    browser.headers["Authorization"] = f"Bearer {used}"
    rows = get(browser, "/").one(id="live-tokens").one("tbody").all("tr")
    assert rows[0].text.startswith("lab compute, read 20") and rows[0].text.endswith(" UTC")
    assert rows[1].text == "spare read not since the start"
    metrics = browser.get("/metrics").text
    assert 'sskt_token_last_used_timestamp_seconds{token="lab"} 1.' in metrics
    assert "spare" not in metrics and used not in metrics
    assert get(client(cache), "/").one(id="live-tokens").text == ""


def test_clients_of_the_last_hour_are_shown_and_counted(
    cache: Path, tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    tokens = tmp_path / "tokens.json"
    secret = new_token(tokens, "lab", ["read"], None)
    browser = client(cache, token_file=str(tokens))
    assert browser.get("/v1/label-sets").status_code == 401
    browser.headers["Authorization"] = f"Bearer {secret}"
    assert get(browser, "/").one(id="live-clients").one("p").text == "None."
    sent = len(browser.get("/v1/label-sets").content) + len(browser.get("/zarr/none").content)
    (row,) = get(browser, "/").one(id="live-clients").one("tbody").all("tr")
    assert row.text.startswith("testclient lab ") and row.text.endswith(" ago")
    metrics = browser.get("/metrics").text
    counted = re.search(
        r'sskt_client_sent_bytes_last_hour{address="testclient",token="lab"} (\S+)', metrics
    )
    assert counted is not None and float(counted[1]) > sent
    assert 'sskt_client_last_seen_timestamp_seconds{address="testclient",token="lab"} 1.' in metrics
    assert secret not in metrics


def test_metrics_say_what_the_cache_holds(cache: Path, client: Callable[..., TestClient]) -> None:
    browser = client(cache)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(browser.get("/metrics").text)
        for sample in family.samples
    }
    label_set = of_encoding(cache, "f32")
    assert found["sskt_label_sets",] == 2 and found["sskt_label_sets_damaged",] == 0
    assert found["sskt_label_set_coverage_ratio", label_set.name] == pytest.approx(1 - 14 / 90)
    assert found["sskt_label_set_bytes", label_set.name] == coverage_of(label_set).bytes
    free = shutil.disk_usage(cache).free
    assert found["sskt_cache_free_bytes",] == pytest.approx(free, rel=0.05)
    assert found["process_resident_memory_bytes",] > 2**24
    shutil.rmtree(cache)
    time.sleep(1.1)  # the lifetime of a listing
    assert "sskt_label_sets " not in browser.get("/metrics").text


def test_the_api_page_has_every_route(cache: Path, client: Callable[..., TestClient]) -> None:
    browser = client(cache)
    page = get(browser, "/docs")
    shown = {h.text for article in page.all("article") for h in article.all("h3")}
    described = browser.get("/v1/openapi.json").json()["paths"]
    assert shown == {f"{m.upper()} {path}" for path, methods in described.items() for m in methods}
    assert "/docs" not in described
    page.one("a", href="/v1/openapi.json")
    batch = next(a for a in page.all("article") if "labels:batch" in a.text)
    assert '"ids"' in batch.text
    assert "`" not in page.text


def test_samples_are_shown_without_torch(stock: Path, tmp_path: Path) -> None:
    name = of_encoding(stock / "cache", "f32").name
    code = (
        "import sys; from starlette.testclient import TestClient; "
        "from sskt.server.app import create_app; from sskt.server.settings import Settings; "
        "app = create_app(Settings(cache=sys.argv[1], run=sys.argv[2])); "
        "client = TestClient(app, base_url='http://localhost'); "
        "image = client.get(f'/sets/{sys.argv[3]}/samples/0/view.png'); "
        "page = client.get(f'/sets/{sys.argv[3]}/samples/0'); "
        "assert (image.status_code, page.status_code) == (200, 200), (image.text, page.text); "
        "assert 'torch' not in sys.modules"
    )
    where = [str(stock / "cache"), str(tmp_path), name]
    done = subprocess.run([sys.executable, "-c", code, *where], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_empty_cache_says_how_to_fill_it(
    tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    (tmp_path / "empty").mkdir()
    page = get(client(tmp_path / "empty"), "/")
    assert page.one(id="live-sets").one("h2").text == "0 label sets"
    line = page.one(class_="empty").one("pre").text
    assert line.startswith("sskt cache-teachers ") and line.endswith(
        "--target shapes --cache empty"
    )
    shutil.rmtree(tmp_path / "empty")
    gone = get(client(tmp_path / "empty"), "/", 503)
    assert gone.one("h1").text == "Cache out of reach"


def test_a_damaged_set_is_named_and_hides_no_other(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    good, bad = list_label_sets(cache)
    (bad.path / "zarr.json").write_text("{")
    page = get(client(cache), "/")
    assert [a.one("h3").text for a in page.all("article")] == [good.name]
    alert = page.one(id="live-damaged")
    assert alert.one("strong").text == bad.name
    assert "is not a label set's metadata" in alert.text
    assert get(client(cache), f"/sets/{bad.name}", 500).one("h1").text == "Label set damaged"


def test_what_others_wrote_is_never_markup(
    images: Path, tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    network = tmp_path / "evil.py"
    network.write_text(
        TINY.read_text() + f"\nCLASSES = [{EVIL + CONTROLS!r} + str(i) for i in range(12)]\n"
    )
    source = open_source(parse_source(f"evil={network}:build"))
    target = replace(open_target(str(images)), name=EVIL)
    options = stage_options(images, "evil")
    views = Views(target, parse_policy("pad-crop-flip"))
    cache_teachers(views, [source], parse_encoding("f32"), 1, tmp_path / "c", options)
    (tmp_path / "c" / EVIL.replace("/", "")).mkdir()
    (tmp_path / "c" / EVIL.replace("/", "") / "zarr.json").write_text("{")
    browser = client(tmp_path / "c")
    state_of(browser).metrics.error(EVIL, EVIL + CONTROLS, EVIL)
    name = state_of(browser).sets.all()[0].name
    urls = ("/", "/status/live", f"/sets/{name}", f"/sets/{name}/samples/3?seed=0")
    for url in (*urls, f"/?q={EVIL}"):
        text = browser.get(url).text
        page = parse(text)
        assert EVIL in page.text
        assert faults(page) == [], "no script, no handler, no foreign address"
        assert not set(CONTROLS[::2]) & set(text)
        assert "<script>alert" not in text and "<img src=x" not in text
        assert all("/sets/" in img.attributes["src"] for img in page.all("img"))
    problem = get(browser, "/sets/<img src=x onerror=alert(1)>", 404)
    assert "<img src=x onerror=alert(1)>" in problem.text and not problem.all("img")


def test_a_sample_shows_the_view_and_what_every_source_says(
    cache: Path, images: Path, client: Callable[..., TestClient]
) -> None:
    first, other = of_encoding(cache, "f32"), of_encoding(cache, "u8")
    browser = client(cache)
    page = get(browser, f"/sets/{first.name}/samples/25?seed=1")
    about = facts(page.one("dl"))
    target = open_target(str(images))
    assert about["Id"] == target.ids[25]
    assert about["True class"] == target.label_text(25)
    assert about["Checksum"] == "none stored yet"
    shown = page.all("div", class_="source")
    assert "not labelled yet" in shown[0].text
    assert top5(shown[1]) == expected_top5(other, 25, 1)

    page = get(browser, f"/sets/{first.name}/samples/12?seed=0")
    assert facts(page.one("dl"))["Checksum"] == "matches: the source saw exactly this"
    shown = page.all("div", class_="source")
    assert [top5(each) for each in shown] == [expected_top5(s, 12, 0) for s in (first, other)]
    bars = [float(bar.attributes["width"]) for bar in shown[0].all("rect", class_="bar")]
    assert bars == [float(f"{float(p) * 100:.2f}") for p in exact(first, 12, 0)]
    image = page.one("img")
    answer = browser.get(image.attributes["src"])
    assert answer.headers["content-type"] == "image/png"
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert pixels.shape == (int(image.attributes["height"]), int(image.attributes["width"]), 3)
    views = Views(target, parse_policy("pad-crop-flip"))
    times = 320 // 24
    assert (pixels == views[12, 0].repeat(times, 0).repeat(times, 1)).all()


def top5(source: Node) -> list[tuple[str, str]]:
    rows = source.one("tbody").all("tr")
    return [(row.one("th").text, row.all("td")[0].text) for row in rows]


def exact(label_set: LabelSet, row: int, seed: int) -> list[float]:
    p = stored_probabilities(label_set, row, seed)
    assert p is not None
    return sorted(p.tolist(), reverse=True)[:5]


def expected_top5(label_set: LabelSet, row: int, seed: int) -> list[tuple[str, str]]:
    p = stored_probabilities(label_set, row, seed)
    assert p is not None
    best = sorted(range(len(p)), key=lambda i: (-p[i], i))[:5]
    return [(label_set.classes[i], f"{p[i]:.4f}") for i in best]


def test_the_browser_leads_from_sample_to_sample(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    name = of_encoding(cache, "f32").name
    browser = client(cache)

    def links(row: int, seed: int) -> dict[str, str]:
        nav = get(browser, f"/sets/{name}/samples/{row}?seed={seed}").one("nav", class_="steps")
        return {a.attributes.get("rel", a.text): a.attributes["href"] for a in nav.all("a")}

    here = links(5, 2)
    assert here["prev"] == f"/sets/{name}/samples/4?seed=2"
    assert here["next"] == f"/sets/{name}/samples/6?seed=2"
    assert here["Next seed"] == f"/sets/{name}/samples/5?seed=0"
    assert "prev" not in links(0, 0) and "next" not in links(29, 0)
    for _ in range(20):
        lead = urljoin(here["Random"], browser.get(here["Random"]).headers["location"])
        assert 8 <= int(urlsplit(lead).path.rsplit("/", 1)[1]) < 30, "block 0 is not labelled"
        assert parse_qs(urlsplit(lead).query) == {"seed": ["2"]}
    jump = browser.get(f"/sets/{name}/samples?row=17&seed=1")
    assert jump.status_code == 303
    lead = urljoin(f"/sets/{name}/samples", jump.headers["location"])
    assert lead == f"/sets/{name}/samples/17?seed=1"
    strip = get(browser, f"/sets/{name}?row=24&seed=1").one("ul", class_="strip").all("li")
    assert [li.one("a").text for li in strip] == [str(row) for row in range(24, 30)]
    assert [li.one("p").text for li in strip] == ["not labelled yet"] * 6
    digest = of_encoding(cache, "f32").digest
    assert get(browser, f"/sets/{digest[:8]}").one("h1").text == name


def test_every_link_holds_under_a_path_prefix(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    """As behind a proxy that takes the prefix off: nothing leaves it, and nothing is missing."""
    browser = client(cache)
    name = of_encoding(cache, "f32").name
    prefix = "http://localhost/labs/vision"
    left = ["/", f"/sets/{name}/samples?row=3&seed=0", "/no/such/page", "/sets/none"]
    seen = {"/no/such/page", "/sets/none"}
    while left:
        path = left.pop()
        answer = browser.get(path)
        if answer.is_redirect:
            links = [answer.headers["location"]]
        elif not answer.headers["content-type"].startswith("text/html"):
            continue
        else:
            nodes = parse(answer.text).all()
            links = [n.attributes[key] for n in nodes for key in LINKS & n.attributes.keys()]
        for link in links:
            url = urljoin(prefix + path, link)
            assert url.startswith(f"{prefix}/"), (path, link)
            bare = url.removeprefix(prefix).partition("#")[0]
            if bare.partition("?")[0] not in seen:
                seen.add(bare.partition("?")[0])
                left.append(bare)
                assert browser.get(bare).status_code in (200, 303), (path, link)
    assert {"/", f"/sets/{name}", f"/sets/{name}/samples/0", "/metrics"} <= seen
    assert any(path.endswith("view.png") for path in seen)


def test_a_browser_without_a_token_gets_a_page(
    cache: Path, tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    tokens = tmp_path / "tokens.json"
    new_token(tokens, "lab", ["read"], None)
    browser = client(cache, token_file=str(tokens))
    page = get(browser, "/", 401)
    assert page.one("h1").text == "Token needed" and "as the password, the token" in page.text
    assert "Basic" in browser.get("/").headers["www-authenticate"]
    assert browser.get("/", headers={"Accept": "*/*"}).json()["title"] == "token needed"


def test_an_unknown_failure_says_where_to_report_it(
    cache: Path, client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*anything: object) -> None:
        raise ValueError("an error of the server itself")

    browser = client(cache)
    monkeypatch.setattr("sskt.server.pages.status._live", fails)
    page = get(browser, "/", 500)
    trackers = [url for url in metadata("sskt").get_all("Project-URL") or [] if "issue" in url]
    where = trackers[0].partition(", ")[2] if trackers else "the maintainers"
    assert "Please report this" in page.text and where in page.text
    assert len(page.one("code").text) == 16, "the request id"
    assert "an error of the server itself" not in page.text


@pytest.mark.parametrize("end", ["30?seed=0", "0?seed=3", "-1?seed=0", "0?seed=-1", f"{10**30}"])
def test_samples_that_are_not_there(
    cache: Path, client: Callable[..., TestClient], end: str
) -> None:
    name = of_encoding(cache, "f32").name
    browser = client(cache)
    page = get(browser, f"/sets/{name}/samples/{end}", 404)
    assert "has samples 0 to 29 and seeds 0 to 2" in page.text
    for url in (
        f"/sets/{name}/samples/{end}",
        f"/sets/{name}/samples/{end}".replace("?", "/view.png?"),
    ):
        answer = browser.get(url, headers={"Accept": "application/json"})
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
    assert browser.get(f"/sets/{name}/samples/x").status_code == 422


def test_without_the_files_the_labels_are_still_shown_and_why_there_are_no_images(
    cache: Path, images: Path, client: Callable[..., TestClient]
) -> None:
    moved = images.with_name("elsewhere")
    images.rename(moved)
    label_set = of_encoding(cache, "u8")
    page = get(client(cache), f"/sets/{label_set.name}/samples/4?seed=1")
    assert not page.all("img")
    assert "The files of the target cannot be read here" in page.text
    assert top5(page.all("div", class_="source")[0]) == expected_top5(label_set, 4, 1)
    strip = get(client(cache), f"/sets/{label_set.name}")
    assert not strip.all("img") and "No images." in strip.text

    victim = sorted((moved / "train" / "apple").iterdir())[0]
    moved.rename(images)
    (images / "train" / "apple" / victim.name).write_bytes(b"other bytes")
    page = get(client(cache), f"/sets/{label_set.name}/samples/0?seed=0")
    assert "target.fingerprint" in page.text and not page.all("img")


def test_an_image_that_changed_is_named(
    cache: Path, images: Path, client: Callable[..., TestClient]
) -> None:
    victim = sorted((images / "train" / "apple").iterdir())[2]
    row = list(open_target(str(images)).ids).index(f"apple/{victim.name}")
    pixels = np.array(Image.open(victim))
    length = victim.stat().st_size
    pixels[:] = 7
    Image.fromarray(pixels).save(victim)
    victim.write_bytes(victim.read_bytes().ljust(length, b"\0"))
    page = get(client(cache), f"/sets/{of_encoding(cache, 'u8').name}/samples/{row}?seed=0")
    assert facts(page.one("dl"))["Checksum"] == "differs: the source saw another image"


def test_a_set_cannot_make_the_server_run_code(
    cache: Path, tmp_path: Path, client: Callable[..., TestClient]
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    label_set = of_encoding(cache, "u8")
    label_set.attributes["made"]["frame_sampling"] = f"{tmp_path / 'own.py'}:pick"
    with pytest.raises(InputError, match="which a server does not run"):
        Opened().views(label_set, SETTINGS)
    del label_set.attributes["made"]["frame_sampling"]
    label_set.spec["views"] |= {"policy": "pick", "code": "sha256:0"}
    with pytest.raises(InputError, match="its views were made by Python code"):
        Opened().views(label_set, SETTINGS)
    assert not ran.exists()


def test_few_targets_stay_open(cache: Path) -> None:
    label_set = of_encoding(cache, "u8")
    opened = Opened()
    views = opened.views(label_set, SETTINGS)
    assert opened.views(label_set, SETTINGS) is views
    for i in range(OPEN):
        attributes = label_set.attributes | {"digest": f"{i:064d}"}
        opened.views(replace(label_set, attributes=attributes), SETTINGS)
    assert len(opened) == OPEN
    assert opened.views(label_set, SETTINGS) is not views


def test_static_files_are_kept_as_long_as_they_stay_the_same(
    cache: Path, client: Callable[..., TestClient]
) -> None:
    browser = client(cache)
    page = get(browser, "/")
    urls = [link.attributes["href"] for link in page.all("link")]
    urls += [script.attributes["src"] for script in page.all("script")]
    assert len(urls) == 3
    for url in urls:
        answer = browser.get(url)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
        assert browser.get(url.split("?")[0]).headers["cache-control"] == "no-cache"
        assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    for name in ("nothing.css", "..%2fstatus.py", "%2e%2e/pages.py", "../templates/base.html"):
        assert browser.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-3600, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.0123, "12 ms"),
        (2.34, "2.3 s"),
        (59.9, "59 s"),
        (3599, "59 min"),
        (7500, "2 h 5 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.9999, "99.9 %"), (0.00001, "<0.1 %"), (0.747, "74.7 %")],
)
def test_only_what_is_whole_is_a_hundred_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_text_in_backticks_is_code_and_never_markup() -> None:
    assert coded("a `b` <i>") == "a <code>b</code> &lt;i&gt;"
    assert coded("`<b>`") == "<code>&lt;b&gt;</code>"
    assert coded("a ` <b>") == "a ` &lt;b&gt;"
