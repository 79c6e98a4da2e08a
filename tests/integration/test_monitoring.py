"""Prometheus' and Grafana's files in docker/: they ask for what the server really counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from sskt.server.app import create_app
from sskt.server.settings import Settings

DOCKER = Path(__file__).resolve().parents[2] / "docker"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "cache"
PROMTOOL = shutil.which("promtool")


def exposed(folder: Path) -> dict[str, set[str]]:
    """Names of all samples that the server exposes, with their labels' names."""
    app: Any = create_app(Settings(cache=str(GOLDEN), run=str(folder)))
    metrics = app.state.metrics
    metrics.request("/zarr", "GET", 200, 0.1, 10)
    metrics.labels("set", 5)
    metrics.decoded(True)
    metrics.decoded(False)
    metrics.computed(1.0, True)
    metrics.waiting(1)
    metrics.token_used("lab")
    metrics.error("kind", "detail", "id")
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/v1/label-sets").status_code == 200
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {sample.name: set(sample.labels) | {"instance", "job"} for sample in samples}


def expressions() -> Iterator[str]:
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "sskt.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]["query"]


def test_every_metric_in_use_exists(tmp_path: Path) -> None:
    known = exposed(tmp_path)
    used = set()
    for expression in expressions():
        for name, matchers in re.findall(r"\b((?:sskt|process)_\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, expression
            assert set(re.findall(r"(\w+)(?:=~|!~|=|!=)\"", matchers)) <= known[name], expression
            used.add(name)
    summed = {name for name in known if name.endswith("_sum")}
    histograms = {name.removesuffix("_sum") for name in summed}
    unused = known.keys() - used - summed
    unused -= {"process_virtual_memory_bytes", "process_start_time_seconds"}
    assert unused == {f"{name}_count" for name in histograms}  # the dashboard shows all there is


def test_dashboard_reads_the_provisioned_source() -> None:
    folder = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "sskt.json").read_text())
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    (provider,) = yaml.safe_load((folder / "dashboards" / "sskt.yaml").read_text())["providers"]
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    mounts = services["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_promtool() -> None:
    if not PROMTOOL:
        pytest.skip("promtool not found (Debian's package prometheus)")
    folder = DOCKER / "prometheus"
    for command in (
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ):
        done = subprocess.run([PROMTOOL, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
