"""Shard files as bytes: their chunks and checksums, and the record that binds them to a label set.

A shard file is a Zarr v3 shard (docs/format.md, section 2): chunks, each of which ends with its
CRC-32C, and an index of their positions, which ends with its own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from sskt.teacher_cache.format.spec import canonical_json

ReadPart = Callable[[int | None, int | None], bytes]
"""Reads a part of a file: bytes ``start`` to ``stop - 1``, the last ``-start`` for a negative
``start`` without ``stop``, everything for two None."""

RECORD_ENDING = ".json"
"""How the names of records end, which lie beside the shards of ``view_check``."""

_CHECKSUM, _BLOSC_OVERHEAD = 4, 16
_ABSENT = 2**64 - 1
_CODECS = ["bytes", "blosc", "crc32c"]
_INDEX_CODECS = ["bytes", "crc32c"]


class NotAsRecorded(ValueError):
    """A shard file that is not the one that its shard's record names."""


@dataclass(frozen=True)
class ShardRecord:
    """The file that binds the arrays' files of one shard to their place.

    A shard whose files lie where those of another shard belong reads without an error otherwise.

    Attributes:
        digest: Digest of the label set.
        seed: View seed.
        block: Number of the block of samples.
        checksums: ``file_checksums`` of the file of each array, by the array's name.
    """

    digest: str
    seed: int
    block: int
    checksums: Mapping[str, str]

    def to_json(self) -> bytes:
        """The bytes of the file: canonical JSON."""
        return canonical_json(asdict(self)).encode()

    def difference(self, digest: str, seed: int, block: int) -> str:
        """What this record is of, if not of this shard of this label set; "" if it is."""
        if self.digest != digest:
            return f"label set {self.digest[:12]}"
        if (self.seed, self.block) != (seed, block):
            return f"seed {self.seed}, block {self.block}"
        return ""


def parse_record(data: bytes) -> ShardRecord:
    """Reads the file of a record.

    Args:
        data: Its bytes.

    Returns:
        The record.

    Raises:
        ValueError: If the bytes are no record.
    """
    document = json.loads(data)
    try:
        digest, seed, block = document["digest"], document["seed"], document["block"]
        checksums = dict(document["checksums"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{error} is missing or of another type") from error
    numbers = type(seed) is int and type(block) is int
    texts = all(isinstance(text, str) for text in (digest, *checksums, *checksums.values()))
    if not (numbers and texts):
        raise ValueError("a field has another type")
    return ShardRecord(digest, seed, block, checksums)


def shard_damage(data: bytes, chunks: int) -> str:
    """Checks a shard file by its own checksums.

    Args:
        data: The bytes of the file.
        chunks: Number of chunks in a shard.

    Returns:
        What is wrong with the file; "" if nothing is.
    """
    try:
        for chunk, (start, length) in enumerate(_index(data, chunks)):
            if start != _ABSENT:
                _payload(data[start : start + length], chunk, length)
    except ValueError as error:
        return str(error)
    return ""


def file_checksums(data: bytes, chunks: int) -> str:
    """The checksums within a shard file, which a record keeps.

    They stand for all of its bytes: the index says where each chunk is, and each chunk ends with
    the CRC-32C of the rest of it.

    Args:
        data: The bytes of the file.
        chunks: Number of chunks in a shard.

    Returns:
        The last four bytes of each chunk in turn (zeros for one that is not stored), then those
        of the index, as hexadecimal digits.

    Raises:
        ValueError: If the index is damaged.
    """
    endings = [start + length for start, length in _index(data, chunks)]
    found = [
        bytes(_CHECKSUM) if stop == 2 * _ABSENT else data[stop - _CHECKSUM : stop]
        for stop in endings
    ]
    return b"".join([*found, data[-_CHECKSUM:]]).hex()


def _index(tail: bytes, chunks: int) -> list[tuple[int, int]]:
    """Position and length of each chunk, from a file or its end. Raises ``ValueError``."""
    size = 16 * chunks + _CHECKSUM
    index = tail[-size:]
    if not tail:
        raise ValueError("it is empty")
    if len(index) < size:
        raise ValueError("the checksum of its index fails")
    numbers = struct.unpack(f"<{2 * chunks}Q", without_checksum(index, "its index"))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _payload(chunk: bytes, number: int, length: int) -> bytes:
    """A chunk without its checksum. Raises ``ValueError``."""
    if length < _CHECKSUM or len(chunk) < length:
        raise ValueError(f"chunk {number} is cut")
    return without_checksum(chunk, f"chunk {number}")


def without_checksum(data: bytes, what: str) -> bytes:
    """Checks the CRC-32C with which a chunk or an index ends, and takes it off.

    Args:
        data: The bytes, which end with the CRC-32C of the others, little-endian.
        what: What they are, for the message.

    Returns:
        The other bytes.

    Raises:
        ValueError: If the checksum is another one, or missing.
    """
    content = data[:-_CHECKSUM]
    if data[-_CHECKSUM:] != struct.pack("<I", crc32c(content)):
        raise ValueError(f"the checksum of {what} fails")
    return content


@dataclass(frozen=True)
class ShardLayout:
    """How the rows of an array lie in its shard files.

    Attributes:
        rows: Samples in a shard.
        chunk_rows: Samples in a chunk.
        shape: Shape of one row: ``(width,)``, or ``()``.
        dtype: Little-endian dtype of the stored values.
        fill: Value of the rows of a chunk that is not stored.
    """

    rows: int
    chunk_rows: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float

    @property
    def chunks(self) -> int:
        """Number of chunks in a shard."""
        return -(-self.rows // self.chunk_rows)

    @property
    def largest(self) -> int:
        """Largest size of a file in bytes: no chunk is compressed, each has Blosc's header."""
        chunk = self.chunk_rows * math.prod(self.shape) * self.dtype.itemsize
        return self.chunks * (chunk + _BLOSC_OVERHEAD + _CHECKSUM + 16) + _CHECKSUM

    def read(self, part: ReadPart, first: int, stop: int, recorded: str = "") -> NDArray[Any]:
        """Reads and decodes rows of a shard file.

        Args:
            part: Reads a part of the file.
            first: First row, counted from the beginning of the shard.
            stop: The row after the last one.
            recorded: The checksums of the file according to the shard's record; "" if the shard
                has none.

        Returns:
            The rows: ``[stop - first, *shape]``.

        Raises:
            ValueError: If the file is damaged.
            NotAsRecorded: If it is not the file that the record names.
        """
        wanted = range(first // self.chunk_rows, -(-stop // self.chunk_rows))
        if len(wanted) == self.chunks:
            begin, data = 0, part(None, None)
            index = _index(data, self.chunks)
            ending = data[-_CHECKSUM:]
        else:
            tail = part(-(16 * self.chunks + _CHECKSUM), None)
            index, ending = _index(tail, self.chunks), tail[-_CHECKSUM:]
            begin, data = _span([index[i] for i in wanted], part)
        expected = bytes.fromhex(recorded)
        if expected and (len(expected) != _CHECKSUM * (self.chunks + 1) or expected[-4:] != ending):
            raise NotAsRecorded("its index is not the one that the shard's record names")
        found = np.empty((stop - first, *self.shape), self.dtype)
        for number in wanted:
            start, length = index[number]
            chunk = data[start - begin : start - begin + length] if start != _ABSENT else b""
            named = expected[_CHECKSUM * number : _CHECKSUM * (number + 1)]
            if expected and (chunk[-_CHECKSUM:] or bytes(_CHECKSUM)) != named:
                raise NotAsRecorded(f"chunk {number} is not the one that the shard's record names")
            self._decode(chunk, number, length, found, first)
        return found

    def _decode(self, chunk: bytes, number: int, length: int, to: NDArray[Any], first: int) -> None:
        """Decodes a chunk into the rows ``to``, which begin with row ``first`` of the shard."""
        from numcodecs import Blosc

        begin = number * self.chunk_rows - first
        end = begin + self.chunk_rows
        rows = to[max(begin, 0) : end]
        if not chunk:
            rows[:] = self.fill
            return
        payload = _payload(chunk, number, length)
        whole = rows if len(rows) == self.chunk_rows else None
        if whole is None:
            whole = np.empty((self.chunk_rows, *self.shape), self.dtype)
        if struct.unpack("<I", payload[4:8].ljust(4, b"\0"))[0] != whole.nbytes:  # Blosc's header
            raise ValueError(f"chunk {number} is not of {whole.nbytes} bytes")
        try:
            Blosc().decode(payload, whole)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"chunk {number} cannot be decompressed ({error})") from error
        if whole is not rows:
            rows[:] = whole[max(-begin, 0) :][: len(rows)]


def _span(chunks: Sequence[tuple[int, int]], part: ReadPart) -> tuple[int, bytes]:
    """Reads the part of a file that holds some chunks: where it begins, and its bytes."""
    stored = [(start, start + length) for start, length in chunks if start != _ABSENT]
    if not stored:
        return 0, b""
    begin = min(start for start, _ in stored)
    return begin, part(begin, max(stop for _, stop in stored))


def layout_of(document: Mapping[str, Any]) -> ShardLayout:
    """The layout of an array's shard files.

    Args:
        document: The array's metadata.

    Returns:
        The layout.

    Raises:
        ValueError, KeyError, TypeError, IndexError: If the metadata is not as docs/format.md says.
    """
    (codec,) = document["codecs"]
    inner = codec["configuration"]
    names = [c["name"] for c in inner["codecs"]]
    index_names = [c["name"] for c in inner["index_codecs"]]
    at_end = inner.get("index_location", "end") == "end"
    as_known = (names, index_names) == (_CODECS, _INDEX_CODECS) and at_end
    if codec["name"] != "sharding_indexed" or not as_known:
        raise ValueError(f"codecs {codec['name']} of {', '.join(names)}")
    shard = [int(n) for n in document["chunk_grid"]["configuration"]["chunk_shape"]]
    chunk = [int(n) for n in inner["chunk_shape"]]
    if chunk[2:] != shard[2:] or shard[0] != chunk[0] or shard[0] != 1 or chunk[1] < 1:
        raise ValueError(f"chunks of {chunk} in shards of {shard}")
    fill = document["fill_value"]
    return ShardLayout(
        rows=shard[1],
        chunk_rows=chunk[1],
        shape=tuple(shard[2:]),
        dtype=np.dtype(document["data_type"]).newbyteorder("<"),
        fill=float(fill),
    )
