"""A Ray cluster: reached, joined or started, and what of it a task holds."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, described

REACH_SECONDS = 5.0
"""How long an address may take to answer."""


@dataclass(frozen=True)
class RayOptions:
    """Where, and what a task holds.

    address: ``auto`` (the cluster of this machine), ``HOST:PORT`` (this machine is one of its
    nodes), ``ray://HOST:PORT`` (Ray Client, from outside); empty: RAY_ADDRESS, else a cluster
    of this machine alone, for this run. task_gpus: a GPU or a fraction of one; None: one if the
    cluster has any and the device may be a GPU. task_cpus: cores, also the threads of a task.
    """

    address: str = ""
    task_gpus: float | None = None
    task_cpus: float = 1.0


def import_ray() -> Any:
    """The module. Raises ``MissingData`` if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingData("--engine ray needs: pip install 'sskt[ray]'") from error


def require_reachable(address: str) -> None:
    """Raises ``InputError`` if nothing answers: Ray itself would try for minutes."""
    scheme, mark, place = address.rpartition("://")
    host, colon, port = place.partition("?")[0].rstrip("/").rpartition(":")
    if address in ("", "auto", "local") or (mark and scheme != "ray"):
        return
    if not (colon and port.isdigit()):
        raise InputError(f"--address {address}: expected auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        kind = "a Ray Client server (port 10001)" if mark else "ray start --head (port 6379)"
        raise InputError(
            f"--address {address}: nothing answers there ({error.strerror or error}); expected "
            f"{kind}"
        ) from error


@contextlib.contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """A session with the cluster, closed at the end if it was opened here.

    While it is, nothing is written to standard output: Ray would tell of dead workers there.
    Raises ``InputError`` if the cluster cannot be had.
    """
    if ray.is_initialized():
        yield
        return
    joins = address not in ("", "local")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        try:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="ray")  # tips for its next versions
                    if joins:
                        with _hushed():
                            ray.init(address=address, **quiet)
                    else:
                        with _uninterrupted():
                            ray.init(address="local", include_dashboard=False, **quiet)
            except Exception as error:
                where = f"cluster at {address}" if joins else "cluster of this machine"
                raise _refused(where, error) from error
            with _terminable():
                yield
        finally:
            with contextlib.suppress(Exception):
                ray.shutdown()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's core prints to standard error while it connects, and fewer attempts.

    It tells of each attempt to log in, from C++; what went wrong is in the exception as well.
    """
    patience = "RAY_gcs_server_port_wait_time_s"
    impatient = patience not in os.environ
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        if impatient:
            os.environ[patience] = "3"
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        if impatient:
            os.environ.pop(patience, None)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off the first Ctrl-C: a cluster that is half started would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def later(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
        if came:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the session in order; Ray's own handler aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _refused(where: str, error: BaseException) -> InputError:
    said, causes = "", [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        said += f"{cause} "
    if "AuthToken" in said or "AuthenticationError" in said or "Unauthenticated" in said:
        return InputError(
            f"the Ray {where} does not take this token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
            "to the cluster's own (on its head: ray get-auth-token)"
        )
    token = (
        "the address, and the cluster's token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN) if it has one"
    )
    return InputError(f"cannot use the Ray {where}: {described(error)}; check {token}")


def _resources(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """CPUs and GPUs of each live node."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [(float(r.get("CPU", 0)), float(r.get("GPU", 0))) for r in alive]


def task_gpus_of(nodes: Sequence[Mapping[str, Any]], device: str, options: RayOptions) -> float:
    """GPUs that a task holds."""
    if options.task_gpus is not None:
        return options.task_gpus
    has_any = any(gpus for _, gpus in _resources(nodes))
    if device == "cuda" and not has_any:
        raise InputError("--device cuda: no node of the Ray cluster has a GPU; use --device cpu")
    return float(has_any and device in ("auto", "cuda"))


def slots_of(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Tasks that can run at a time. Raises ``InputError`` if none can: Ray would wait forever."""
    slots, found = 0, []
    for node_cpus, node_gpus in _resources(nodes):
        by_cpus = int(node_cpus / cpus + 1e-9)
        slots += min(by_cpus, int(node_gpus / gpus + 1e-9)) if gpus else by_cpus
        found.append(f"{node_cpus:g} CPU + {node_gpus:g} GPU")
    if not slots:
        raise InputError(
            f"no node of the Ray cluster holds a task of {cpus:g} CPU + {gpus:g} GPU (nodes: "
            f"{', '.join(sorted(set(found))) or 'none'}); change --task-cpus or --task-gpus, or "
            "start such a node first"
        )
    return slots
