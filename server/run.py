"""Running the server: one socket, its worker processes, and the compute worker."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.supervisors import Multiprocess

from sskt.server.http.auth import is_loopback
from sskt.server.http.logs import log_config, set_up
from sskt.server.http.protocol import LimitedProtocol, many_files
from sskt.server.http.tokens import Tokens
from sskt.server.run_folder import run_folder
from sskt.server.settings import VARIABLE, Settings
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.object_store import BucketStorage
from sskt.teacher_cache.storage.open import open_cache

GRACE_SECONDS = 4
"""Seconds that a stop waits for answers that are being sent; then they are cut off."""
RESTART_SECONDS = 5.0
"""Seconds before a compute worker that died is started again."""
BACKLOG = 4096

_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
_log = logging.getLogger("sskt.server")


def serve(settings: Settings, ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP (which nohup makes it ignore).

    Args:
        settings: What ``sskt serve`` was given.
        ready: Called with the URL once the server listens.

    Raises:
        InputError: For settings that are not valid.
        MissingData: If there is no cache.
    """
    require_allowed(settings)
    cache = open_cache(settings.cache)
    if not isinstance(cache, LocalStorage | BucketStorage):
        raise InputError(f"cannot serve {cache}; --cache takes a folder or a bucket's URL")
    held_sets = bool(cache.folders())
    device = cache.path.stat().st_dev if held_sets and isinstance(cache, LocalStorage) else None
    if (
        settings.on_demand
        and isinstance(cache, LocalStorage)
        and not os.access(cache.path, os.W_OK)
    ):
        raise InputError(f"--on-demand writes into {cache}, which this user may not")
    set_up(settings.log)
    many_files()
    with listening(settings.host, settings.port) as listener, run_folder() as run:
        port = listener.getsockname()[1]
        cache_name = full_name(settings.cache)
        settings = replace(settings, cache=cache_name, cache_device=device, run=str(run), port=port)
        os.environ[VARIABLE] = settings.as_json()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(run / "prometheus")
        config = uvicorn.Config(
            "sskt.server.app:worker",
            factory=True,
            http=LimitedProtocol,
            loop="uvloop",
            lifespan="off",
            ws="none",
            workers=settings.workers,
            log_config=log_config(settings.log),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        signal.signal(signal.SIGTERM, _stop)
        if not hangups_are_ignored():
            signal.signal(signal.SIGHUP, _hang_up)
        if settings.token_file and not is_loopback(settings.host):
            _log.warning(
                "tokens and labels are sent unencrypted to other machines unless a proxy in front "
                "of this server offers https (docs/deployment.md)"
            )
        with compute_worker(settings):
            if ready:
                ready(f"http://{host_name(settings.host)}:{port}")
            if settings.workers > 1:
                supervisor = _Supervisor(config, [listener])
                supervisor.run()
                if supervisor.interrupted:
                    raise KeyboardInterrupt
            else:
                uvicorn.Server(config).run(sockets=[listener])


class _Supervisor(Multiprocess):
    interrupted = False

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        hangups = signal.SIG_IGN if hangups_are_ignored() else None
        super().__init__(config, sockets)
        if hangups is not None:
            signal.signal(signal.SIGHUP, hangups)

    def handle_hup(self) -> None:
        self.handle_term()

    def handle_int(self) -> None:
        self.interrupted = True
        super().handle_int()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _hang_up(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)


def hangups_are_ignored() -> bool:
    """Whether the server is to outlive its terminal, as nohup makes it."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def require_allowed(settings: Settings) -> None:
    """Raises ``InputError`` for invalid settings, or if other machines can read without tokens."""
    if not math.isfinite(settings.memory):
        raise InputError(f"--memory must be finite, found {settings.memory}")
    for origin in settings.cors:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(
                f"--cors {origin} is not the origin of a page; expected https://HOST or "
                "http://HOST:PORT in lower case, without a path"
            )
    if settings.token_file:
        Tokens(Path(settings.token_file)).require_usable()
    elif not is_loopback(settings.host):
        raise InputError(
            f"--host {settings.host} can be reached from other machines, so --token-file is "
            "required; make one with sskt token new NAME --token-file FILE"
        )


def host_name(host: str) -> str:
    """A host as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


def full_name(cache: str) -> str:
    """The cache by a name that does not depend on the current folder."""
    return cache if "://" in cache else str(Path(cache).resolve())


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """The bound socket. Raises ``InputError`` if the address cannot be used."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # clients may queue while the workers start
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port"
        ) from error
    listener.set_inheritable(True)
    with contextlib.closing(listener):
        yield listener


@contextlib.contextmanager
def compute_worker(settings: Settings) -> Iterator[None]:
    """Runs the compute worker with ``--on-demand``, and starts it again if it dies."""
    if not settings.on_demand:
        yield
        return
    from sskt.server.compute.worker import run_compute_worker

    spawn = multiprocessing.get_context("spawn")
    stopped = threading.Event()
    running: list[multiprocessing.process.BaseProcess] = []

    def keep() -> None:
        while not stopped.is_set():
            process = spawn.Process(
                target=run_compute_worker, args=(settings,), name="sskt-compute"
            )
            process.start()
            running[:] = [process]
            process.join()
            if not stopped.is_set():
                _log.error(
                    "the compute worker ended (status %s); it is started again", process.exitcode
                )
                stopped.wait(RESTART_SECONDS)

    keeper = threading.Thread(target=keep, name="sskt-compute-keeper", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stopped.set()
        for process in running:
            process.terminate()
        keeper.join(GRACE_SECONDS)
