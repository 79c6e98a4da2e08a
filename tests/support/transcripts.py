"""Transcripts of the documentation: run as printed, and compared with what is printed.

A fenced block ``console`` holds commands after ``$ `` and what they print. All blocks of a page
run in one shell, in order. Numbers, digests, sizes and times may differ; a line ``...`` stands
for any lines. ``PYTHONPATH=tests python tests/support/transcripts.py PAGE...`` writes what the
commands print now into the pages (from the repository's root, with the real data at hand).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
WRAPPER = """#!{python}
import sys
from sskt.cli.main import main
main(sys.argv[1:])
"""
NUMBER = re.compile(r"(?<![A-Za-z])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?![A-Za-z])")


@dataclass
class Step:
    """One command of a transcript and what it prints."""

    command: str
    output: list[str]


def steps_of(block: str) -> list[Step]:
    """The commands of a block; a line that ends with a backslash goes on in the next line."""
    steps: list[Step] = []
    lines = iter(block.splitlines())
    for line in lines:
        if not line.startswith("$ "):
            if not steps:
                raise ValueError(f"a transcript begins with a command, not with {line!r}")
            steps[-1].output.append(line)
            continue
        command = line.removeprefix("$ ")
        while command.endswith("\\"):
            command += "\n" + next(lines)
        steps.append(Step(command, []))
    return steps


def pages() -> list[Path]:
    """The pages that have transcripts."""
    found = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [page for page in found if BLOCK.search(page.read_text("utf-8"))]


def shape(line: str) -> str:
    """A line without the numbers, digests, sizes and times that differ between machines."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b", "#", line)
    line = re.sub(r"\b[0-9a-f]{12}(?=\b|\.)", "#", line)
    line = NUMBER.sub("#", line)
    line = re.sub(r"# ?(B|KiB|MiB|GiB|TiB|s|ms|min|h)\b", "#", line)
    return re.sub(r"-{3,}|─{3,}", "---", " ".join(line.split()))


def agrees(printed: list[str], found: list[str]) -> bool:
    """Whether the output has the printed shape, where ``...`` stands for any lines."""
    if not printed:
        return not found
    if printed[0].strip() == "...":
        return any(agrees(printed[1:], found[i:]) for i in range(len(found) + 1))
    return bool(found) and shape(printed[0]) == shape(found[0]) and agrees(printed[1:], found[1:])


class Shell:
    """A bash in a folder with ``sskt`` on its path."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        programs = folder / ".programs"
        programs.mkdir()
        sskt = programs / "sskt"
        sskt.write_text(WRAPPER.format(python=sys.executable))
        sskt.chmod(sskt.stat().st_mode | stat.S_IXUSR)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SSKT_")}
        environment = kept | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SSKT_HOME": str(folder / ".home"),
            "COLUMNS": "110",
            "NO_COLOR": "1",
        }
        self._port = port
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> tuple[list[str], int]:
        """The lines that a command prints, and its exit status."""
        assert self._bash.stdin
        assert self._bash.stdout
        mark = "-- done --"
        if self._port:
            command = command.replace("8080", str(self._port))
        self._bash.stdin.write(f"{command}\necho '{mark}' $?\n")
        self._bash.stdin.flush()
        lines: list[str] = []
        for line in self._bash.stdout:
            before, found, after = line.rstrip("\n").partition(mark)
            if found:
                return [*lines, *([before] if before else [])], int(after)
            lines.append(before.replace(str(self._port), "8080") if self._port else before)
        raise RuntimeError(f"the shell ended in: {command}")

    def close(self) -> None:
        """Ends the shell and everything that it started."""
        import signal

        try:
            os.killpg(self._bash.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        self._bash.wait(30)
        if self._bash.stdout:
            self._bash.stdout.close()
        if self._bash.stdin:
            self._bash.stdin.close()


def prepare(folder: Path, data: Path) -> None:
    """The working folder of the pages: real data under the names that they use."""
    with tarfile.open(data / "cifar10-jpeg.tar.gz") as archive:
        archive.extractall(folder / ".cifar", filter="data")
    train = next(path for path in (folder / ".cifar").rglob("train") if path.is_dir())
    train.parent.rename(folder / "cifar10")
    for name in ("models", "ucf101", "miniplaces"):
        (folder / name).symlink_to(data / name)
    validation = folder / "imagenet/val"
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
    (folder / "miniplaces.csv").write_text("\n".join(lines) + "\n")


def rewrite(page: Path, shell: Shell) -> str:
    """The text of a page with what its commands print now; lines ``...`` stay as they are."""

    def block(found: re.Match[str]) -> str:
        lines = []
        for step in steps_of(found[1]):
            printed, status = shell.run(step.command)
            print(f"{page.name}: {step.command.splitlines()[0]} -> {status}", flush=True)
            keep = agrees(step.output, printed) and "..." in step.output
            lines += [f"$ {step.command}", *(step.output if keep else printed)]
        return "```console\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(block, page.read_text("utf-8"))


def main(arguments: list[str]) -> None:
    """Writes what the commands of the pages print now."""
    data = Path(os.environ.get("SSKT_TEST_DATA", ROOT.parent / "shared/data"))
    for page in map(Path, arguments):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, data.resolve())
            shell = Shell(folder, free_port())
            try:
                page.write_text(rewrite(page, shell), "utf-8")
            finally:
                shell.close()


if __name__ == "__main__":
    main(sys.argv[1:])
