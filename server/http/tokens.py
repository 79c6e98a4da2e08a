"""Who may ask: tokens of 256 random bits, of which only SHA-256 is kept.

A file of JSON that nobody but its owner (and group) reads:
``{"version": 1, "tokens": [{"name", "hash", "scopes", "created", "expires"}]}``, times in seconds
since 1970. A file that cannot be read or understood lets nobody in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.storage.locks import file_lock

SCOPES = ("read", "compute")
PREFIX = "sskt_"
FRESH_SECONDS = 0.2
"""How long a look at the file holds: a revoked token works no longer than this."""

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_SECRET = 256
_HASH_PREFIX = "sha256:"
_OPEN_TO_OTHERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP
_log = logging.getLogger("sskt.tokens")

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Token:
    """A token without its secret. created, expires: seconds since 1970; None: never."""

    name: str
    scopes: frozenset[str]
    expires: float | None
    created: float = 0.0

    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= time.time()


@dataclass(frozen=True)
class _Entry:
    token: Token
    digest: bytes


class Tokens:
    """The tokens of a file as they are now, whoever changes it. Safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._looked = -FRESH_SECONDS
        self._signature: Signature | None = None
        self._entries: list[_Entry] = []
        self._failure: InputError | None = None

    def check(self, secret: str) -> Token | None:
        """The token with that secret, None if there is none or its time is over.

        Takes as long whichever entry fits. Raises ``InputError`` if the file cannot be used.
        """
        entries = self._now()
        if len(secret) > _LONGEST_SECRET:
            return None
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).digest()
        found = None
        for entry in entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.token
        return None if found is None or found.expired() else found

    def require_usable(self) -> None:
        """Raises ``MissingData`` without the file, ``InputError`` if it cannot be used."""
        self._now()

    def _now(self) -> list[_Entry]:
        with self._guard:
            if time.monotonic() - self._looked >= FRESH_SECONDS:
                self._look()
                self._looked = time.monotonic()
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            return self._entries

    def _look(self) -> None:
        try:
            if self._failure is None and _signature(self._path.stat()) == self._signature:
                return
        except OSError:
            pass  # opening it tells why
        try:
            self._entries, self._signature = _read(self._path)
            self._failure = None
        except InputError as error:
            if str(error) != str(self._failure):
                _log.error("nobody is let in: %s", error)
            self._entries, self._signature, self._failure = [], None, error


def new_token(path: Path, name: str, scopes: Iterable[str], days: float | None) -> str:
    """Adds a token to the file (made where absent); its secret, which is kept nowhere.

    ``compute`` brings ``read`` with it. days: how long it is good for, None: for ever.
    Raises ``InputError`` for a name that is taken or unusable, ``UnknownName`` for a scope.
    """
    wanted = frozenset(scopes)
    for scope in sorted(wanted - set(SCOPES)):
        raise UnknownName("scope", scope, SCOPES)
    if "compute" in wanted:
        wanted |= {"read"}
    if not wanted:
        raise InputError(f"a token without scopes opens nothing; give some of {', '.join(SCOPES)}")
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a token's name is 1 to 64 letters, digits, '.', '_' and '-', found {name!r}"
        )
    if days is not None and not 0 < days < 1e6:
        raise InputError(f"days must be more than 0 and less than 1,000,000, found {days}")
    secret = PREFIX + secrets.token_urlsafe(32)
    now = time.time()
    token = Token(name, wanted, None if days is None else now + days * 86400, now)

    def add(entries: list[_Entry]) -> list[_Entry]:
        if any(entry.token.name == name for entry in entries):
            raise InputError(
                f"{path} has a token {name!r}; choose another name, or first: "
                f"sskt token revoke {name}"
            )
        return [*entries, _Entry(token, hashlib.sha256(secret.encode()).digest())]

    _change(path, add, make=True)
    return secret


def list_tokens(path: Path) -> list[Token]:
    """All tokens in the order they were made, expired ones too. Raises ``InputError``."""
    return [entry.token for entry in _read(path)[0]]


def revoke(path: Path, name: str) -> None:
    """Removes a token: it stops working at once. Raises ``UnknownName``, ``InputError``."""

    def remove(entries: list[_Entry]) -> list[_Entry]:
        left = [entry for entry in entries if entry.token.name != name]
        if len(left) == len(entries):
            raise UnknownName("token", name, [entry.token.name for entry in entries])
        return left

    _change(path, remove, make=False)


def _signature(found: os.stat_result) -> Signature:
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> tuple[list[_Entry], Signature]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except FileNotFoundError:
        raise MissingData(
            f"no token file {path}; make one with sskt token new NAME --token-file {path}"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read the token file {path}: {error.strerror}") from error
    if found.st_mode & _OPEN_TO_OTHERS:
        _log.warning(
            "%s is open to others (mode %o); chmod 600 keeps the tokens' names and hashes private",
            path,
            stat.S_IMODE(found.st_mode),
        )
    try:
        return _parse(data), _signature(found)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(
            f"the token file {path} is damaged ({type(error).__name__}); bring back a copy, or "
            "remove it and make new tokens"
        ) from None


def _parse(data: bytes) -> list[_Entry]:
    document = json.loads(data)
    if document["version"] != _VERSION:
        raise ValueError("version")
    entries = [_parse_entry(value) for value in document["tokens"]]
    if len({entry.token.name for entry in entries}) != len(entries):
        raise ValueError("two tokens of one name")
    return entries


def _parse_entry(value: dict[str, Any]) -> _Entry:
    name, kept, scopes = value["name"], value["hash"], frozenset(value["scopes"])
    created, expires = float(value["created"]), value["expires"]
    digest = bytes.fromhex(kept.removeprefix(_HASH_PREFIX)) if isinstance(kept, str) else b""
    if not _NAME.fullmatch(name) or len(digest) != 32 or not scopes <= set(SCOPES):
        raise ValueError("entry")
    if expires is not None:
        expires = float(expires)
        if expires != expires:  # NaN is later than no time
            raise ValueError("expires")
    return _Entry(Token(name, scopes, expires, created), digest)


def _change(path: Path, change: Callable[[list[_Entry]], list[_Entry]], make: bool) -> None:
    """Rewrites the file, one process at a time."""
    path = path.resolve()
    with _locked(path):
        try:
            entries = _read(path)[0]
        except MissingData:
            if not make:
                raise
            entries = []
        tokens = [
            {
                "name": entry.token.name,
                "hash": _HASH_PREFIX + entry.digest.hex(),
                "scopes": sorted(entry.token.scopes),
                "created": entry.token.created,
                "expires": entry.token.expires,
            }
            for entry in change(entries)
        ]
        document = {"version": _VERSION, "tokens": tokens}
        try:
            _replace(path, json.dumps(document, indent=2).encode() + b"\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(file_lock(lock))
        except OSError as error:
            raise InputError(f"cannot write in {path.parent}: {error.strerror}") from error
        yield


def _replace(path: Path, data: bytes) -> None:
    """As ``durable_write``, but private from the first byte, and kept by its owner.

    An administrator who adds a token must not take the file away from the server's user.
    """
    from sskt.teacher_cache.storage.atomic import durable_write

    def keep_owner(handle: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            old = path.stat()
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, stat.S_IMODE(old.st_mode) & ~_OPEN_TO_OTHERS)

    durable_write(path, data, prepare=keep_owner)
