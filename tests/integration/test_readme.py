"""README's commands run as printed, on the real data, in a folder that has what they name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
CODE = "from sskt.cli.main import main; import sys; main(sys.argv[1:])"

SMALLER = {"--limit 2000": "--limit 200", "--epochs 3": "--epochs 1", "--limit 1000": "--limit 100"}
"""Fewer samples and epochs than printed, so that the commands take minutes."""
NOT_HERE = ("DATA", "...", "resnet-18-kinetics", "s3://", "squeezenet1_0_imagenet", "compare.html")
"""Commands with a part like these need data or weights that cannot be had here."""
HEADINGS = ("On real images", "Videos", "Looking at labels", "Before a long run")


def blocks(heading: str) -> list[str]:
    """The code blocks of a section."""
    text = README.read_text("utf-8")
    section = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", text, re.M | re.S)
    assert section, f"no section {heading!r} in the README"
    return re.findall(r"^```\n(.*?)^```", section[0], re.M | re.S)


def commands(heading: str) -> list[str]:
    """The commands of a section: lines with a prompt, or without one where a block has none."""
    found = []
    for block in blocks(heading):
        whole = block.replace("\\\n", " ")
        lines = [line for line in whole.splitlines() if line.startswith(("$ sskt ", "sskt "))]
        found += [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in lines]
    return [" ".join(line.split()) for line in found]


@pytest.fixture
def folder(data: Path, cifar: Path, tmp_path: Path) -> Path:
    """A working folder with the real data under the names that the README uses."""
    shutil.copytree(cifar, tmp_path / "cifar10")
    (tmp_path / "models").symlink_to(data / "models")
    (tmp_path / "ucf101").symlink_to(data / "ucf101")
    (tmp_path / "miniplaces").symlink_to(data / "miniplaces")
    validation = tmp_path / "imagenet/val"
    for image in sorted((data / "imagenet").glob("*.JPEG")):
        wnid = next(part for part in re.split(r"[_.]", image.name) if re.fullmatch(r"n\d{8}", part))
        (validation / wnid).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, validation / wnid)
    names = {}
    for line in (data / "miniplaces/devkit/categories.txt").read_text().splitlines():
        name, _, number = line.rpartition(" ")
        names[number] = name[3:]
    lines = ["path,label,split"]
    for line in (data / "miniplaces/val_subset.txt").read_text().splitlines():
        file, _, number = line.partition(" ")
        lines.append(f"{file},{names[number]},val")
    (tmp_path / "miniplaces.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    for printed, smaller in SMALLER.items():
        command = command.replace(printed, smaller)
    program, *arguments = shlex.split(command)
    assert program == "sskt"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSKT_")}
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=folder,
        env=environment | {"SSKT_HOME": str(folder / "home")} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("heading", HEADINGS)
def test_the_commands_of_a_section(heading: str, folder: Path) -> None:
    ran = 0
    for command in commands(heading):
        if any(part in command for part in NOT_HERE):
            continue
        done = run(command, folder)
        contradicts = "--dry-run" in command  # the printed example of a refusal
        assert done.returncode == (2 if contradicts else 0), f"{command}\n{done.stderr[-2000:]}"
        if contradicts:
            assert "was made with --limit 200, but --limit 100 was given" in done.stderr
        ran += 1
    assert ran


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The label server of the README over a cache of its own; its address."""
    label = next(c for c in commands("On real images") if c.startswith("sskt cache-teachers"))
    assert run(label, folder).returncode == 0
    new, serve = commands("One label server for the lab")[:2]
    made = run(new.partition(" > ")[0], folder)
    assert made.returncode == 0, made.stderr
    (folder / "secret").write_text(made.stdout)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*shlex.split(serve)[1:], "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *words], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        for line in process.stderr:
            if "serving labels at" in line:
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_the_commands_of_the_label_server(folder: Path, server: str) -> None:
    token = (folder / "secret").read_text().strip()
    listing, training = commands("One label server for the lab")[2:]
    for command in (listing, f"{training} --epochs 1"):
        done = run(command.replace("http://labels:8080", server), folder, SSKT_TOKEN=token)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_every_section_has_commands() -> None:
    for heading in (*HEADINGS, "One label server for the lab", "The first commands"):
        assert commands(heading), heading
