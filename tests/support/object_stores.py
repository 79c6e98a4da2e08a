"""A real S3 server on loopback, and its objects as obstore sees them."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

NEEDED = ("obstore", "moto", "flask")
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Server:
    """An S3 server in a process of its own, on a free port of the loopback."""

    def __init__(self, **environment: str) -> None:
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=pipe,
            stdout=pipe,
            stderr=quiet,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def new_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        assert urllib.request.urlopen(request).status == 200

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Points obstore's own variables to it."""
        for key in [k for k in os.environ if k.startswith("AWS_")]:
            patch.delenv(key)
        patch.setenv("AWS_ENDPOINT_URL", self.url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def raw(cache: str) -> Any:
    """The prefix as obstore sees it, without anything of ours."""
    from obstore.store import from_url

    return from_url(cache)


def objects(cache: str) -> dict[str, bytes]:
    """Every object below the prefix."""
    import obstore

    store = raw(cache)
    names = [found["path"] for batch in obstore.list(store) for found in batch]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}
