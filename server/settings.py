"""The settings of a label server; its worker processes get them through the environment."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field

VARIABLE = "SSKT_SERVER"
"""Environment variable that carries the settings to the workers."""


@dataclass(frozen=True)
class Settings:
    """The arguments of ``sskt serve``, and its run folder.

    cache: folder or URL of the label sets. run: temporary folder shared by this server's
    processes. memory: GiB of decoded labels for batches, an equal part for each worker. queue:
    shards that may wait to be computed. wait_seconds: how long a request waits for one.
    max_seeds: to which a request may let a label set grow. max_ids,
    max_body (bytes), max_answer (bytes), max_decoded (bytes of the chunks that its rows are in): of
    one batch. max_requests, max_requests_each: at once, of a worker and of one client
    of it (a token from one address). header_seconds, body_seconds: for a client to send them.
    request_seconds: until the first byte of an answer. send_seconds: a client that takes nothing
    for so long is cut off.
    allowed_hosts: names that clients may use for the server besides those of the loopback; without
    any, all of them if there is a token file.
    cors: origins whose pages may read answers.
    log: json or text. root: where the targets are now, for the sample browser and for computing.
    sources, weights, frame_sampling, policy, allow_outside_root: what the person who started the
    server named for computing; a label set's own record never chooses code.
    cache_device: number of the device that the cache's folder was on when the server started, if it
    held label sets. started: by the machine's monotonic clock.
    """

    cache: str
    run: str
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    token_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    on_demand: bool = False
    device: str = "auto"
    root: str | None = None
    sources: tuple[str, ...] = ()
    weights: str | None = None
    frame_sampling: str | None = None
    policy: str | None = None
    allow_outside_root: bool = False
    cache_device: int | None = None
    log: str = "json"
    queue: int = 64
    max_seeds: int = 1024
    wait_seconds: float = 20
    memory: float = 2.0
    max_ids: int = 65536
    max_answer: int = 2**28
    max_decoded: int = 2**32
    max_body: int = 2**20
    max_requests: int = 64
    max_requests_each: int = 16
    max_connections: int = 16384
    header_seconds: float = 20
    body_seconds: float = 30
    request_seconds: float = 60
    send_seconds: float = 60
    started: float = field(default_factory=time.monotonic, compare=False)

    def as_json(self) -> str:
        """For ``from_environment``."""
        return json.dumps(asdict(self))


def from_environment() -> Settings:
    """The settings that the supervisor has put into the environment."""
    return Settings(**json.loads(os.environ[VARIABLE]))
