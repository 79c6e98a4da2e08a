"""The label server under load, beside nginx: bytes in order, and batches in random order.

    python benchmarks/server.py [--seconds 60] [--clients 1,8,32]

One label set of real size (float16, 1,000 classes) on the loopback. Three servers are asked in
turn, in rounds of ten seconds, for the same bytes: nginx alone on the files, ``sskt serve`` alone
(one worker), and nginx with the configuration in ``docker/nginx`` in front of ``sskt serve``. Each
client reads an epoch's shards in order over one kept connection, again and again. Prints labels/s,
latency of a shard, CPU time of all processes of the server for each label, and errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sskt.benchmarks.common import in_a_run, log_softmax, new_label_set, report, write_labels
from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.label_sets.create import SHARD_ROWS
from sskt.teacher_cache.label_sets.label_set import LabelSet

SAMPLES, CLASSES, SEEDS = 40960, 1000, 2
ROUND = 10.0
HEADER = "SSKT_BENCHMARK_HEADER"
"""Environment variable with the Authorization header, for the client's process."""
NGINX = "/usr/sbin/nginx"
"""Where it is where users have no /usr/sbin in their PATH."""
SHIPPED = Path(__file__).resolve().parents[1] / "docker/nginx"


_given: set[int] = set()


@dataclass
class Load:
    """What one server did for so many clients."""

    labels: int = 0
    bytes: int = 0
    errors: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def add(self, other: Load) -> None:
        self.labels += other.labels
        self.bytes += other.bytes
        self.errors += other.errors
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.latencies += other.latencies


def make_labels(cache: Path) -> LabelSet:
    """Labels of random logits: they compress as real ones do (about 1.7 bytes a class)."""
    label_set = new_label_set(cache, SAMPLES, CLASSES, SEEDS)
    rng = np.random.default_rng(0)
    log_p = log_softmax(rng.normal(0, 2, (SHARD_ROWS, CLASSES)).astype(np.float32))
    write_labels(label_set, [log_p])
    label_set.close()
    return label_set


def epoch_of(label_set: LabelSet) -> list[tuple[str, int]]:
    """Paths of the label files in order, and the labels in each."""
    return [
        (
            f"/zarr/{label_set.name}/{label_set.shard_key(label_set.arrays[-1], shard)}",
            shard.stop - shard.start,
        )
        for shard in label_set.shards(range(label_set.seeds))
    ]


@dataclass
class Client:
    """One kept connection that reads shards in order."""

    sock: socket.socket
    at: int
    expected: int = -1
    received: int = 0
    head: bytes = b""
    begun: float = 0.0


def drive(port: int, epoch: Sequence[tuple[str, int]], clients: int, seconds: float) -> Load:
    """Many clients in one process, by epoll: what they cost is the same for every server."""
    load, buffer = Load(), bytearray(2**20)
    waiting = selectors.DefaultSelector()
    for i in range(clients):
        sock = socket.create_connection(("127.0.0.1", port))
        client = Client(sock, i % len(epoch))
        _ask(client, epoch)
        waiting.register(sock, selectors.EVENT_READ, client)
    begin = time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        for key, _ in waiting.select(1.0):
            client = key.data
            count = client.sock.recv_into(buffer)
            if count == 0:
                load.errors += 1
                waiting.unregister(client.sock)
                continue
            _take(client, buffer, count)
            if client.received < client.expected or client.expected < 0:
                continue
            now = time.perf_counter()
            if not client.head.startswith(b"HTTP/1.1 200"):
                load.errors += 1
            else:
                load.labels += epoch[client.at][1]
                load.bytes += client.received
                load.latencies.append(now - client.begun)
            client.at = (client.at + 1) % len(epoch)
            _ask(client, epoch)
    load.seconds = time.perf_counter() - begin
    for key in list(waiting.get_map().values()):
        key.data.sock.close()
    return load


def _ask(client: Client, epoch: Sequence[tuple[str, int]]) -> None:
    client.expected, client.received, client.head = -1, 0, b""
    client.begun = time.perf_counter()
    head = f"GET {epoch[client.at][0]} HTTP/1.1\r\nHost: labels\r\n{os.environ[HEADER]}\r\n\r\n"
    client.sock.sendall(head.encode())


def _take(client: Client, buffer: bytearray, count: int) -> None:
    if client.expected >= 0:
        client.received += count
        return
    client.head += bytes(buffer[:count])
    end = client.head.find(b"\r\n\r\n")
    if end < 0:
        return
    client.received = len(client.head) - end - 4
    client.head = client.head[:end]
    for line in client.head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            client.expected = int(line.partition(b":")[2])


def measure(
    port: int, pids: Sequence[int], epoch: list[tuple[str, int]], clients: int, seconds: float
) -> Load:
    """One round against one server; its CPU time is that of all its processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(len, ((),))  # the client's process has started
        before = cpu_of(pids)
        load: Load = pool.apply(drive, (port, epoch, clients, seconds))
        load.cpu = cpu_of(pids) - before
    return load


def cpu_of(pids: Sequence[int]) -> float:
    import psutil

    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def sskt_serve(cache: Path, workers: int = 1) -> Iterator[tuple[int, int]]:
    """``sskt serve`` on a free port: (port, process id)."""
    port = free_port()
    run = [sys.executable, "-c", "from sskt.cli.main import main; main()"]
    tokens = cache.with_name(f"tokens-{port}.json")
    new = [*run, "token", "new", "load", "--token-file", str(tokens)]
    token = subprocess.run(new, check=True, capture_output=True, text=True).stdout.strip()
    os.environ[HEADER] = f"Authorization: Bearer {token}"
    command = [*run, "serve", "--cache", str(cache), "--token-file", str(tokens)]
    command += ["--port", str(port), "--workers", str(workers), "--max-requests-each", "64"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


BARE = """
worker_processes auto;
daemon off;
pid {run}/bare.pid;
error_log {run}/bare.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {run}/bare-body;
    proxy_temp_path {run}/bare-proxy;
    fastcgi_temp_path {run}/bare-fastcgi;
    uwsgi_temp_path {run}/bare-uwsgi;
    scgi_temp_path {run}/bare-scgi;
    server {{
        listen 127.0.0.1:{port};
        location /zarr/ {{ alias {cache}/; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(text: str, run: Path, name: str, port: int) -> Iterator[tuple[int, int]]:
    """nginx with a configuration: (port, process id)."""
    file = run / f"{name}.conf"
    file.write_text(text)
    binary = shutil.which("nginx") or NGINX
    process = subprocess.Popen([binary, "-p", str(run), "-c", str(file)])
    try:
        wait_for(port)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A port that nobody listens on, another one each time."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def wait_for(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def row(name: str, load: Load, base: Load) -> str:
    times = np.array(load.latencies) * 1e3
    rate = load.labels / load.seconds
    return (
        f"{name:<34}{rate:>12,.0f}{load.bytes / load.seconds / 1e6:>9,.0f}"
        f"{np.percentile(times, 50):>9.1f}{np.percentile(times, 99):>9.1f}"
        f"{load.cpu / load.labels * 1e6:>11.2f}{load.errors:>8}"
        f"{rate / (base.labels / base.seconds):>9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--json", type=Path, help="write the figures to FILE")
    asked = parser.parse_args(["--seconds", "10"] if in_a_run() else None)
    if not SHIPPED.is_dir() or not (shutil.which("nginx") or Path(NGINX).exists()):
        raise MissingData(
            "the label server is compared with nginx: install nginx, and run this in a checkout of "
            "the repository, which has its configuration"
        )
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sskt-bench-") as folder, contextlib.ExitStack() as up:
        run = Path(folder)
        run.chmod(0o755)
        label_set = make_labels(run / "cache")
        epoch = epoch_of(label_set)
        size = sum(label_set.storage.size(p.split("/", 3)[3]) or 0 for p, _ in epoch)
        print(f"{SEEDS * SAMPLES:,} labels in {len(epoch)} shards, {size / 1e6:,.0f} MB in order")
        python, pid = up.enter_context(sskt_serve(run / "cache"))
        port = free_port()
        bare = BARE.format(run=run, port=port, cache=run / "cache")
        servers: dict[str, tuple[int, ...]] = {
            "nginx alone": (*up.enter_context(nginx(bare, run, "bare", port)),)
        }
        servers["sskt serve, 1 worker"] = (python, pid)
        front = free_port()
        shipped = shipped_configuration(run, front, python)
        servers["shipped nginx before sskt serve"] = (
            *up.enter_context(nginx(shipped, run, "shipped", front)),
            pid,
        )
        for clients in map(int, asked.clients.split(",")):
            loads = {name: Load() for name in servers}
            for _ in range(max(1, round(asked.seconds / ROUND))):
                for name, (port, *pids) in servers.items():
                    loads[name].add(measure(port, pids, epoch, clients, min(ROUND, asked.seconds)))
            base = loads["nginx alone"]
            print(
                f"\n{clients} client{'s' if clients > 1 else ''}, {base.seconds:.0f} s each\n"
                f"{'':<34}{'labels/s':>12}{'MB/s':>9}{'p50 ms':>9}{'p99 ms':>9}"
                f"{'CPU us/lab':>11}{'errors':>8}{'ratio':>9}"
            )
            for name, load in loads.items():
                print(row(name, load, base), flush=True)
                rate = load.labels / load.seconds
                found.append({"server": name, "clients": clients, "labels_s": rate})
    if in_a_run():
        rows = [
            (f"{f['server']}, {f['clients']} clients: read", f["labels_s"], "labels/s")
            for f in found
        ]
        report("label server, shards in order", rows, {})
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2))


def shipped_configuration(run: Path, front: int, behind: int) -> str:
    """The configuration in docker/nginx with this run's paths, ports and a certificate."""
    key, certificate = run / "tls.key", run / "tls.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )  # fmt: skip
    values = dict(
        line.split("=", 1)
        for line in (SHIPPED / "nginx.env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    values |= {
        "SSKT_CACHE": str(run / "cache"),
        "SSKT_UPSTREAM": f"127.0.0.1:{behind}",
        "SSKT_LISTEN_TLS": f"127.0.0.1:{free_port()}",
        "SSKT_LISTEN_REDIRECT": f"127.0.0.1:{free_port()}",
        "SSKT_LISTEN_LOCAL": f"127.0.0.1:{front}",
        "SSKT_CERTIFICATE": str(certificate),
        "SSKT_CERTIFICATE_KEY": str(key),
        "SSKT_RUN": str(run),
        "SSKT_ACCESS_LOG": str(run / "access.log"),
        "SSKT_ERROR_LOG": str(run / "error.log"),
    }
    text = (SHIPPED / "nginx.conf.template").read_text()
    text = re.sub(r"\$\{(SSKT_\w+)\}", lambda found: values[found[1]], text)
    return "daemon off;\n" + text


if __name__ == "__main__":
    main()
