"""The nginx of docker/nginx, run from the very configuration that ships, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_ports

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "nginx"
TEMPLATE = FOLDER / "nginx.conf.template"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
OPENSSL = shutil.which("openssl")
START_SECONDS = 20.0


@dataclass(frozen=True)
class Front:
    """A running nginx: ports, its self-signed certificate, its folder (access.log, error.log)."""

    tls: int
    redirect: int
    local: int
    certificate: Path
    folder: Path

    def trusting(self) -> ssl.SSLContext:
        """A client's settings that trust this nginx and nobody else."""
        return ssl.create_default_context(cafile=str(self.certificate))


def variables(path: Path = FOLDER / "nginx.env") -> dict[str, str]:
    """The variables of an env file, as docker and systemd read it."""
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled_in(**given: str) -> str:
    """The configuration with these values instead of those in nginx.env, as envsubst does it."""
    values = variables()
    unknown = set(given) - set(values)
    assert not unknown, unknown
    values |= given
    return re.sub(r"\$\{(SSKT_\w+)\}", lambda match: values[match[1]], TEMPLATE.read_text())


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost and 127.0.0.1, and its key."""
    assert OPENSSL
    certificate, key = folder / "tls.crt", folder / "tls.key"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [OPENSSL, "req", "-x509", *kind, *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextlib.contextmanager
def front(folder: Path, cache: Path, upstream: str, **given: str) -> Iterator[Front]:
    """Runs the shipped nginx before ``upstream`` (HOST:PORT); only paths, ports, limits differ."""
    assert NGINX
    folder.mkdir(parents=True, exist_ok=True)
    tls, redirect, local = free_ports(3)
    certificate, key = self_signed(folder)
    configuration = folder / "nginx.conf"
    text = filled_in(
        **{
            "SSKT_CACHE": str(cache),
            "SSKT_UPSTREAM": upstream,
            "SSKT_LISTEN_TLS": f"127.0.0.1:{tls}",
            "SSKT_LISTEN_REDIRECT": f"127.0.0.1:{redirect}",
            "SSKT_LISTEN_LOCAL": f"127.0.0.1:{local}",
            "SSKT_PUBLIC": f"localhost:{tls}",
            "SSKT_CERTIFICATE": str(certificate),
            "SSKT_CERTIFICATE_KEY": str(key),
            "SSKT_RUN": str(folder),
            "SSKT_ACCESS_LOG": str(folder / "access.log"),
            "SSKT_ERROR_LOG": str(folder / "error.log"),
        }
        | given
    )
    configuration.write_text(text)
    # Temporary folders are root's alone where root runs this; nginx would become nobody.
    user = " user root;" if os.geteuid() == 0 else ""
    command = [NGINX, "-e", str(folder / "error.log"), "-c", str(configuration)]
    process = subprocess.Popen([*command, "-g", f"daemon off;{user}"])
    try:
        for port in (tls, redirect, local):
            await_port(port, process, folder)
        yield Front(tls, redirect, local, certificate, folder)
    finally:
        process.terminate()
        process.wait(20)


def await_port(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                log = folder / "error.log"
                said = log.read_text() if log.exists() else ""
                raise RuntimeError(f"nginx does not listen on {port}: {said}") from None
            time.sleep(0.01)
