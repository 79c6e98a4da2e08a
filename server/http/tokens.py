"""Tokens of 256 random bits, of which only SHA-256 is kept, in a file of JSON.

The file is private to its owner (and group):
``{"version": 1, "tokens": [{"name", "hash", "scopes", "created", "expires"}]}``, times in seconds
since 1970. If it cannot be read or understood, every token is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.locks import file_lock
from sskt.teacher_cache.storage.regular_files import open_regular

ScopeName = Literal["read", "compute"]
SCOPES: tuple[ScopeName, ...] = ("read", "compute")
PREFIX = "sskt_"
OLD = ".old"
"""What the name of a token ends with whose secret was replaced and is still valid."""
FRESH_SECONDS = 0.2
"""Seconds between two looks at the file: a revoked token works no longer than this."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_LONGEST_SECRET = 256
_OPEN_TO_OTHERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP
_log = logging.getLogger("sskt.tokens")


class Token(BaseModel, frozen=True):
    """A token without its secret.

    Attributes:
        name: Letters, digits, ``.``, ``_`` and ``-``.
        hash: ``sha256:`` and the digest of the secret.
        scopes: Some of ``SCOPES``.
        created: Seconds since 1970.
        expires: Seconds since 1970; None if it never does.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    hash: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$", repr=False)]
    scopes: tuple[ScopeName, ...]
    created: FiniteFloat
    expires: FiniteFloat | None

    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= time.time()


class _Document(BaseModel):
    """The content of the file."""

    version: Literal[1]
    tokens: list[Token]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len({token.name for token in self.tokens}) != len(self.tokens):
            raise ValueError("two tokens of one name")
        return self


class Tokens:
    """The tokens of a file as they are now; any process may change it. Safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._looked = -FRESH_SECONDS
        self._signature: tuple[int, ...] | None = None
        self._tokens: list[Token] = []
        self._failure: InputError | None = None

    def check(self, secret: str) -> Token | None:
        """Finds the token of a secret; takes as long for each token of the file.

        Returns:
            The token; None if no such token exists or it has expired.

        Raises:
            InputError: If the file cannot be used.
        """
        if len(secret) > _LONGEST_SECRET:
            return None
        digest = _hash(secret)
        # An unknown token may be new.
        found = _find(self._now(), digest) or _find(self._now(at_once=True), digest)
        return None if found is None or found.expired() else found

    def all(self) -> list[Token]:
        """All tokens, expired ones too. Raises ``InputError`` if the file cannot be used."""
        return self._now()

    def require_usable(self) -> None:
        """Raises ``MissingData`` without the file, ``InputError`` if it cannot be used."""
        _read(self._path)

    def _now(self, at_once: bool = False) -> list[Token]:
        with self._guard:
            if at_once or time.monotonic() - self._looked >= FRESH_SECONDS:
                self._look()
                self._looked = time.monotonic()
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            return self._tokens

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # opening it says why
            if self._failure is None and _signature(self._path.stat()) == self._signature:
                return
        try:
            self._tokens, self._signature = _read(self._path)
            self._failure = None
        except InputError as error:
            if str(error) != str(self._failure):
                _log.error("the token file cannot be read; all requests are refused: %s", error)
            self._tokens, self._signature, self._failure = [], None, error


def _find(tokens: list[Token], digest: str) -> Token | None:
    found = None
    for token in tokens:
        if hmac.compare_digest(token.hash, digest):
            found = token
    return found


def new_token(path: Path, name: str, scopes: Iterable[str], days: float | None) -> str:
    """Adds a token to the file, which is made if it does not exist.

    Args:
        path: The token file.
        name: Of the token.
        scopes: Some of ``SCOPES``; ``compute`` includes ``read``.
        days: How long it is valid; None: until it is revoked.

    Returns:
        The secret, which is kept nowhere.

    Raises:
        InputError: For a name that is taken or not valid, or days out of range.
        UnknownName: For a scope.
        DiskFull: If there is no room for it.
    """
    wanted = set(scopes)
    for scope in sorted(wanted - set(SCOPES)):
        raise UnknownName("scope", scope, SCOPES)
    if "compute" in wanted:
        wanted.add("read")
    if not wanted:
        raise InputError(f"a token without scopes opens nothing; give some of {', '.join(SCOPES)}")
    if not re.fullmatch(_NAME, name):
        raise InputError(
            f"a token's name is 1 to 64 letters, digits, '.', '_' and '-', found {name!r}"
        )
    if days is not None and not 0 < days < 1e6:
        raise InputError(f"days must be more than 0 and less than 1,000,000, found {days}")
    secret, now = PREFIX + secrets.token_urlsafe(32), time.time()
    token = Token(
        name=name,
        hash=_hash(secret),
        scopes=tuple(scope for scope in sorted(SCOPES) if scope in wanted),
        created=now,
        expires=None if days is None else now + days * 86400,
    )

    def add(tokens: list[Token]) -> list[Token]:
        if any(each.name == name for each in tokens):
            raise InputError(
                f"{path} has a token {name!r}; choose another name, or first: "
                f"sskt token revoke {name}"
            )
        return [*tokens, token]

    _change(path, add, create=True)
    return secret


def rotate(path: Path, name: str, grace_hours: float) -> str:
    """Gives a token a new secret; the old one stays valid for a while as ``NAME.old``.

    Args:
        path: The token file.
        name: Of the token. Its scopes stay, and it is valid for as long again as it was made for.
        grace_hours: Hours for which the old secret stays valid; 0: it stops working at once.

    Returns:
        The new secret, which is kept nowhere.

    Raises:
        UnknownName: If there is no such token.
        InputError: For hours out of range, if an older secret of that token is still valid, or if
            the file cannot be used.
        DiskFull: If there is no room for it.
    """
    if not 0 <= grace_hours < 1e6:
        raise InputError(
            f"--grace must be at least 0 and less than 1,000,000 hours, found {grace_hours:g}"
        )
    secret, now = PREFIX + secrets.token_urlsafe(32), time.time()
    kept = name + OLD

    def exchange(tokens: list[Token]) -> list[Token]:
        found = {token.name: token for token in tokens}
        if name not in found:
            raise UnknownName("token", name, list(found))
        older = found.get(kept)
        if older and not older.expired() and grace_hours:
            raise InputError(
                f"{name} was rotated before, and its older secret is still valid as {kept}; first "
                f"run: sskt token revoke {kept}"
            )
        old = found[name]
        life = None if old.expires is None else old.expires - old.created
        changes = {
            "hash": _hash(secret),
            "created": now,
            "expires": None if life is None else now + life,
        }
        end = now + grace_hours * 3600
        ending = {"name": kept, "expires": end if old.expires is None else min(end, old.expires)}
        left = [token for token in tokens if token.name not in (name, kept)]
        left.append(old.model_copy(update=changes))
        return [*left, old.model_copy(update=ending)] if grace_hours else left

    if not re.fullmatch(_NAME, kept):
        raise InputError(f"{kept} is no name of a token: at most 64 characters; use a shorter name")
    _change(path, exchange, create=False)
    return secret


@contextlib.contextmanager
def secret_file(path: Path) -> Iterator[IO[str]]:
    """A new file for a secret, which only this user can read; removed again if the work fails.

    Args:
        path: The file; it must not exist.

    Yields:
        The file, open for writing.

    Raises:
        InputError: If it exists, or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(
            f"{path} exists and is not overwritten; choose another --out, or remove the file"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write the secret to {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w") as file:
            yield file
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write the secret to {path}: {error.strerror}") from error
        raise


def list_tokens(path: Path) -> list[Token]:
    """All tokens in the order they were made, expired ones too. Raises ``InputError``."""
    return _read(path)[0]


def revoke(path: Path, name: str) -> None:
    """Removes a token: it stops working at once. Raises ``UnknownName``, ``InputError``."""

    def remove(tokens: list[Token]) -> list[Token]:
        left = [token for token in tokens if token.name != name]
        if len(left) == len(tokens):
            raise UnknownName("token", name, [token.name for token in tokens])
        return left

    _change(path, remove, create=False)


def _hash(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read(path: Path) -> tuple[list[Token], tuple[int, ...]]:
    try:
        with open_regular(path) as file:
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
        return _Document.model_validate_json(data).tokens, _signature(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"the token file {path} is damaged ({where}: {first['msg']}); restore it from a copy, "
            "or remove it and make new tokens"
        ) from None


def _change(path: Path, change: Callable[[list[Token]], list[Token]], create: bool) -> None:
    """Rewrites the file, one process at a time."""
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{path.name}.lock")):
            try:
                tokens = _read(path)[0]
            except MissingData:
                if not create:
                    raise
                tokens = []
            document = _Document(version=1, tokens=change(tokens))
            _replace(path, document.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    """As ``durable_write``, but private from the first byte, and left to its owner.

    An administrator who adds a token must not take the file away from the server's user.
    """

    def keep_owner(handle: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            old = path.stat()
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, stat.S_IMODE(old.st_mode) & ~_OPEN_TO_OTHERS)

    durable_write(path, data, prepare=keep_owner)
