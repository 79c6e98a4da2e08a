"""A label server as an admin starts it, and raw connections to attack it; all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sskt.server.settings import Settings
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import classes_identity
from sskt.teacher_cache.label_sets.create import create_label_set
from support.served import Answer, read_answer, request

WAIT = 60
"""Seconds after which a test fails that waits for something."""
COMMAND = "from sskt.cli.main import main; main()"
TUNED = """
import json, sys
from sskt.server.run import serve
from sskt.server.settings import Settings
def ready(url): print("serving at", url, "()", file=sys.stderr)
serve(Settings(**json.loads(sys.argv[1])), ready=ready)
"""


@dataclass
class Attacked:
    """A running ``sskt serve``. ``excused``: parts of paths whose failures the test made itself."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    cache: Path
    excused: list[str] = field(default_factory=list)
    _seen: int = 0

    def connect(self, source: int = 1, receive_buffer: int = 0) -> socket.socket:
        """A connection from 127.0.0.``source``."""
        client = socket.socket()
        try:
            client.settimeout(WAIT)
            if receive_buffer:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source != 1:
                client.bind((f"127.0.0.{source}", 0))
            client.connect(("127.0.0.1", self.port))
        except BaseException:
            client.close()
            raise
        return client

    def ask(self, data: bytes, source: int = 1) -> Answer:
        """Sends a whole request and reads its answer."""
        with self.connect(source) as client:
            with contextlib.suppress(OSError):  # refused while it is being sent
                client.sendall(data)
            return read_answer(client)

    def get(self, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        """Asks for a path, which is sent as it is."""
        return self.ask(request(path, *headers, method=method, body=body))

    def together(
        self, messages: Mapping[str, bytes], seconds: float = 2.0, enough: float = 0.5
    ) -> dict[str, tuple[bytes, bool]]:
        """Sends each message on a connection of its own: what came back, and whether it was closed.

        Ends ``enough`` seconds after the last byte from the server, ``seconds`` at the longest.
        """
        came: dict[str, tuple[bytes, bool]] = dict.fromkeys(messages, (b"", False))
        with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as stack:
            for name, message in messages.items():
                client = stack.enter_context(self.connect())
                with contextlib.suppress(OSError):
                    client.sendall(message)
                client.setblocking(False)
                waiting.register(client, selectors.EVENT_READ, (name, client))
            last, end = time.monotonic(), time.monotonic() + seconds
            while waiting.get_map() and time.monotonic() < min(last + enough, end):
                for key, _ in waiting.select(0.1):
                    name, client = key.data
                    try:
                        data = client.recv(2**16)
                    except ConnectionError:
                        data = b""
                    came[name] = (came[name][0] + data, not data)
                    last = time.monotonic()
                    if not data:
                        waiting.unregister(client)
        return came

    def lines(self) -> list[dict[str, Any]]:
        """The log: each line after the greeting is one JSON object, whatever was sent."""
        text = self.log.read_bytes().decode()
        parsed = [json.loads(line) for line in text.split("\n")[1:-1]]
        assert all(isinstance(line, dict) for line in parsed)
        return parsed

    def require_well(self) -> list[dict[str, Any]]:
        """Alive and ready, no failure of its own since the last look; the lines logged since."""
        assert self.process.poll() is None
        answer = self.get("/readyz")
        assert (answer.status, json.loads(answer.body)["status"]) == (200, "ready")
        new = self.lines()[self._seen :]
        self._seen += len(new)
        for line in new:
            if not any(part in line.get("path", "") for part in self.excused):
                assert line["level"] in ("info", "warning") and "traceback" not in line, line
                assert line.get("status", 0) not in (500, 502, 504), line
        return new

    def rss(self) -> int:
        """Bytes of memory of all its processes together that no file backs."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = 0
        for each in (pid, *children):
            with contextlib.suppress(FileNotFoundError):
                status = Path(f"/proc/{each}/status").read_text()
                total += 1024 * int(status.partition("RssAnon:")[2].split(maxsplit=1)[0])
        return total


@contextlib.contextmanager
def serving(folder: Path, cache: Path, *arguments: object) -> Iterator[Attacked]:
    """``sskt serve`` with some arguments."""
    command = ["-c", COMMAND, "serve", "--cache", str(cache), "--port", "0"]
    with _running(folder, cache, [*command, *map(str, arguments)]) as server:
        yield server


@contextlib.contextmanager
def tuned(folder: Path, cache: Path, **settings: Any) -> Iterator[Attacked]:
    """The same with settings that the command line does not have."""
    asked = Settings(cache=str(cache), run="", port=0, **settings)
    with _running(folder, cache, ["-c", TUNED, asked.as_json()]) as server:
        yield server


@contextlib.contextmanager
def _running(folder: Path, cache: Path, command: Sequence[str]) -> Iterator[Attacked]:
    log = folder / "serve.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, *command], stderr=errors, env=environment)
    try:
        port = _port_of(process, log)
        server = Attacked(port, process, log, cache)
        _until_ready(server)
        server._seen = len(server.lines())
        yield server
    finally:
        process.terminate()
        try:
            process.wait(WAIT)
        finally:
            process.kill()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + WAIT
    while b"\n" not in (text := log.read_bytes()):
        assert process.poll() is None and time.monotonic() < end, text.decode()
        time.sleep(0.05)
    return int(text.split(b" (")[0].rpartition(b":")[2])


def _until_ready(server: Attacked) -> None:
    end = time.monotonic() + WAIT
    while True:
        assert server.process.poll() is None and time.monotonic() < end, server.log.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            assert server.get("/readyz").status == 200
            return
        time.sleep(0.05)


def make_wide(cache: Path, samples: int) -> str:
    """A label set of 1,000 classes in shards of 8,192 rows, all stored; its name.

    Its spec says less than ours do, as another tool's may.
    """
    names = tuple(f"class {i}" for i in range(1000))
    kind = parse_encoding("f16")
    spec = {
        "format": 1,
        "target": {"name": "wide", "split": "train", "size": samples, "fingerprint": "wide"},
        "source": {"name": "wide", "arch": "none", "classes": classes_identity(names)},
        "views": {"policy": "none", "version": 1, "parameters": {}, "f_s": "identity"},
        "encoding": kind.identity(),
    }
    label_set = create_label_set(
        cache, spec, names, 1, shard_rows=8192, provenance={"source": "none"}
    )
    rng = np.random.default_rng(0)
    rows = np.log(rng.dirichlet(np.ones(1000), 512)).astype(np.float32)
    for shard in label_set.missing(range(1)):
        count = shard.stop - shard.start
        log_p = np.resize(rows, (count, 1000))
        checks = np.zeros(count, np.uint32)
        label_set.write(shard, label_set.encoding.encode(log_p), checks)
    label_set.close()
    return label_set.name


@contextlib.contextmanager
def many_files(count: int) -> Iterator[bool]:
    """Allows this process so many open files; False where the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(hard, count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield most >= count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
