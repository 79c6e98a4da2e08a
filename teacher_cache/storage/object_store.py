"""Caches in object stores: ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX``, ``az://CONTAINER/PREFIX``.

Credentials, endpoints and time limits are those of obstore (the Rust crate object_store), from
its environment variables and the usual machine roles; sskt adds none:

- S3 and what speaks it: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``,
  ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP=true`` for an ``http://`` endpoint,
  ``AWS_SKIP_SIGNATURE=true`` for public buckets, ``AWS_TIMEOUT`` (of one request; default 30s);
- ``GOOGLE_SERVICE_ACCOUNT`` (a file) or the application default credentials;
- ``AZURE_STORAGE_ACCOUNT_NAME`` and ``AZURE_STORAGE_ACCOUNT_KEY``, ``AZURE_STORAGE_SAS_KEY``, ….

Requests that fail on the way are repeated by obstore (10 times, up to three minutes).

Shards are conditional creates: of two writers the first one's shard stays, and the second one finds
it. There are no locks between machines: two processes may label the same shard, which costs time
and nothing else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sskt.teacher_cache.errors import InputError, MissingData, SsktError
from sskt.teacher_cache.format.names import is_set_name, set_name

_CONFLICTS = 100
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class NoLocks:
    """The locks of a storage that has none: all are granted."""

    def acquire(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        return True

    def release(self, byte: int) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""

    def held(self, byte: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class _Object:
    size: int
    e_tag: str | None


@dataclass
class BucketStorage:
    """A prefix of a bucket. See ``base.Storage``.

    The objects below each first-level key are listed once, and again after ``refresh``. Objects
    that this process has stored are known without a listing.
    """

    bucket: Any = field(repr=False)
    root: str
    path: str
    is_local: ClassVar[bool] = False
    _listed: dict[str, dict[str, _Object]] = field(default_factory=dict, repr=False)
    _stored: dict[str, _Object] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def below(self, name: str) -> BucketStorage:
        return BucketStorage(self.bucket, self.root, self.key(set_name(name)))

    def key(self, key: str) -> str:
        """The name of a key in the bucket."""
        return f"{self.path}/{key}" if self.path else key

    def where(self, key: str) -> str:
        return f"{self}/{key}"

    def there(self) -> bool:
        import obstore

        with plainly(str(self)):
            found = obstore.list_with_delimiter(self.bucket, self.path or None)
        return bool(found["common_prefixes"] or found["objects"])

    def folders(self) -> list[str]:
        import obstore

        with plainly(str(self)):
            found = obstore.list_with_delimiter(self.bucket, self.path or None)
        names = [prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]
        return [name for name in sorted(names) if is_set_name(name)]

    def _list(self, under: str) -> dict[str, _Object]:
        import obstore

        prefix = self.key(under).rstrip("/")
        skipped = len(self.path) + 1 if self.path else 0
        with plainly(self.where(under)):
            return {
                found["path"][skipped:]: _Object(found["size"], found["e_tag"])
                for batch in obstore.list(self.bucket, f"{prefix}/" if prefix else None)
                for found in batch
            }

    def _known(self, key: str) -> _Object | None:
        first, inner, _ = key.partition("/")
        if not inner:
            return self._head(key)
        listed = self._listed.get(first)
        if listed is None:  # kept apart: another thread may refresh meanwhile
            listed = self._listed[first] = self._list(first)
        return listed.get(key) or self._stored.get(key)

    def _head(self, key: str) -> _Object | None:
        import obstore

        try:
            with plainly(self.where(key)):
                found = obstore.head(self.bucket, self.key(key))
        except FileNotFoundError:
            return None
        return _Object(found["size"], found["e_tag"])

    def entity(self, key: str) -> tuple[int, str] | None:
        """The size and strong entity tag of an object now; None if there is none."""
        found = self._head(key)
        return (found.size, found.e_tag or f'"{found.size:x}"') if found else None

    def sizes(self, under: str = "") -> dict[str, int]:
        return {key: found.size for key, found in self._list(under).items()}

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        found = self._head(key) if fresh else self._known(key)
        return found.size if found else None

    def refresh(self) -> None:
        self._listed.clear()

    def read(self, key: str) -> bytes:
        return self._get(key)[0]

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        import obstore

        if start is None and stop is None:
            return self.read(key)
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(key)
        begin, end, _ = slice(start, stop).indices(size)
        if begin >= end:
            return b""
        with plainly(self.where(key)):
            found = obstore.get_range(self.bucket, self.key(key), start=begin, end=end)
            return found.to_bytes()

    def _get(self, key: str) -> tuple[bytes, Any]:
        """The content, and the version by which a conditional put names it."""
        import obstore

        with plainly(self.where(key)):
            found = obstore.get(self.bucket, self.key(key))
            version = {k: found.meta[k] for k in ("e_tag", "version") if found.meta[k]}
            return bytes(found.bytes()), version

    def distrust(self, key: str) -> None:
        """Does nothing: there are no copies."""

    def md5(self, key: str) -> str | None:
        found = self._known(key)
        digest = _MD5.fullmatch(found.e_tag or "") if found else None
        return digest[1] if digest else None

    def _put(self, key: str, data: bytes, mode: Any) -> None:
        import obstore

        with plainly(self.where(key)):
            done = obstore.put(self.bucket, self.key(key), data, mode=mode, use_multipart=False)
        self._stored[key] = _Object(len(data), done["e_tag"])
        for listed in self._listed.values():
            listed.pop(key, None)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        for _ in range(_CONFLICTS):
            try:
                self._put(key, data, "create")
                return True
            except AlreadyExistsError:
                found = self._head(key)
            except NotImplementedError:  # as with AWS_CONDITIONAL_PUT=disabled
                found = self._head(key)
                if found is None:
                    self.put(key, data)
                    return True
            if found:
                self._stored[key] = found
                return False
        raise InputError(f"cannot store {self.where(key)}: it is refused as there, but is not")

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        for _ in range(_CONFLICTS):
            data, version = self._get(key)
            changed = change(data)
            if changed is None:
                return
            try:
                self._put(key, changed, version or "overwrite")
                return
            except (AlreadyExistsError, PreconditionError):  # somebody else was faster
                continue
            except NotImplementedError:
                self.put(key, changed)
                return
        raise InputError(f"cannot update {self.where(key)}: others change it all the time")

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        gone = list(keys)
        if not gone:
            return
        try:
            with plainly(str(self)):
                obstore.delete(self.bucket, [self.key(key) for key in gone])
        except FileNotFoundError:  # some stores say so, and then leave the others
            for key in gone:
                with contextlib.suppress(FileNotFoundError), plainly(self.where(key)):
                    obstore.delete(self.bucket, self.key(key))
        for key in gone:
            self._stored.pop(key, None)
        self.refresh()

    def locks(self, name: str) -> NoLocks:
        return NoLocks()

    def close(self) -> None:
        """Does nothing: obstore's requests end by themselves."""


@contextlib.contextmanager
def plainly(url: str) -> Iterator[None]:
    """Turns the errors of obstore into ``InputError`` with the URL, in one line.

    ``FileNotFoundError``, ``NotImplementedError`` and the errors of conditional puts pass; a
    range that is not there is a ``ValueError``.
    """
    from obstore import exceptions as failed

    try:
        yield
    except (failed.AlreadyExistsError, failed.PreconditionError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise _no_bucket(url) from error
        raise
    except (failed.BaseError, PermissionError) as error:
        said = str(error)
        if re.search(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist", said):
            raise _no_bucket(url) from error
        kinds = (failed.PermissionDeniedError, failed.UnauthenticatedError, PermissionError)
        if isinstance(error, kinds) or re.search(r"40[13] (Forbidden|Unauthorized)", said):
            raise InputError(
                f"access to {url} denied{_code(said)}; check the credentials in the environment "
                "(AWS_..., GOOGLE_..., AZURE_...) and what they allow"
            ) from error
        if re.search(r"416 Range Not Satisfiable|Received non-partial response", said):
            raise ValueError(f"{url} is shorter than a shard can be") from error
        hint = ""
        if "builder error" in said:
            hint = " (an http:// endpoint needs AWS_ALLOW_HTTP=true)"
        raise InputError(f"cannot reach {url}: {_reason(said)}{hint}") from error


def _no_bucket(url: str) -> SsktError:
    bucket = "/".join(url.split("/", 3)[:3])
    return InputError(f"no such bucket {bucket}; make it first, or check its name and AWS_REGION")


def _code(said: str) -> str:
    found = re.search(r"<Code>(\w+)</Code>", said)
    return f" ({found[1]})" if found else ""


def _reason(said: str) -> str:
    """The first line of obstore's message, without the document that the server sent."""
    lines = said.splitlines() or ["no reason given"]
    return lines[0].split(": <?xml")[0].strip() + _code(said)


def open_bucket(scheme: str, rest: str) -> BucketStorage:
    """Opens the storage of a cache in a bucket, which is not contacted yet.

    Args:
        scheme: ``s3``, ``gs`` or ``az``.
        rest: ``BUCKET/PREFIX``.

    Raises:
        InputError: If the URL or the credentials cannot be used.
        MissingData: If obstore is not installed.
    """
    try:
        import obstore.store
    except ImportError as error:
        raise MissingData(f"{scheme}:// caches need: pip install 'sskt[cloud]'") from error
    bucket, _, path = rest.partition("/")
    parts = [part for part in path.split("/") if part]
    if not bucket or {".", ".."} & set(parts):
        raise InputError(
            f"cannot use {scheme}://{rest} as cache; expected {scheme}://BUCKET/PREFIX"
        )
    root = f"{scheme}://{bucket}"
    try:
        with plainly(root):
            store = obstore.store.from_url(root)
    except ValueError as error:
        raise InputError(f"cannot use {root} as cache: {_reason(str(error))}") from error
    return BucketStorage(store, root, "/".join(parts))
