"""Real processes to be killed in the middle, started without paying for the imports each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAUNCHER = """
import importlib, json, os, signal, sys
import torch, torchvision
from sskt.cli import main
for module, _ in main.COMMANDS.values():
    importlib.import_module(module)
from sskt.teacher_cache.label_sets import find as catalog
from sskt.teacher_cache.tools import export, copy as transfer, verify
from sskt.teacher_cache.labeling import run as stage
try:
    import obstore
except ImportError:
    obstore = None

def arm(step, names):
    # SIGKILL to this process just before its step-th call of one of them, in os or obstore.
    left = [step]
    def dying(call):
        def instead(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)
        return instead
    for name in names:
        owner = obstore if name in ("put", "delete") else os
        if owner:
            setattr(owner, name, dying(getattr(owner, name)))

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    else:
        answer = os.fork()
        if not answer:
            os.setsid()
            signal.alarm(order["seconds"])  # one that hangs fails
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(order["environment"])
            for number, name in ((0, "in"), (1, "out"), (2, "err")):
                flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(order[name], flags), number)
            if order["die_at"]:
                arm(order["die_at"], order["steps"])
            status = main.run(order["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(answer, flush=True)
"""


CHANGES = ("rename", "replace", "unlink", "rmdir", "put", "delete")
"""Calls that change what is stored."""


class Launcher:
    """A Python that has imported sskt and forks a process for each command line.

    A process told to ``die_at`` N is killed just before its N-th call of ``steps``.
    """

    def __init__(self, folder: Path, steps: Sequence[str] = CHANGES, seconds: int = 60) -> None:
        self.folder, self._steps, self._count = folder, list(steps), 0
        self._seconds = seconds
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", LAUNCHER]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def _ask(self, **order: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *arguments: object, die_at: int = 0) -> Run:
        """A command line in a process of its own, with this process's AWS_... and SSKT_TOKEN."""
        self._count += 1
        out, err = (self.folder / f"{self._count}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()  # a process may be killed before it opens them
        files = {"in": os.devnull, "out": str(out), "err": str(err)}
        cloud = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "SSKT_TOKEN"))}
        texts = [str(a) for a in arguments]
        child = self._ask(
            arguments=texts,
            die_at=die_at,
            steps=self._steps,
            seconds=self._seconds,
            environment=cloud,
            **files,
        )
        return Run(self, child, out, err)

    def wait(self, child: int) -> int:
        return self._ask(wait=child)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


class Run:
    """One process of a launcher."""

    def __init__(self, launcher: Launcher, child: int, out: Path, err: Path) -> None:
        self._launcher, self.child, self._out, self._err = launcher, child, out, err

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)

    def wait(self) -> tuple[int, str, str]:
        status = self._launcher.wait(self.child)
        return status, self._out.read_text(), self._err.read_text()


@contextmanager
def launched(folder: Path, steps: Sequence[str] = CHANGES, seconds: int = 60) -> Iterator[Launcher]:
    """A launcher for the time of a test module; ``seconds``: what takes longer is killed."""
    launcher = Launcher(folder, steps, seconds)
    try:
        yield launcher
    finally:
        launcher.close()
