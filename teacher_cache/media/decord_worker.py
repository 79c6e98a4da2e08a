"""Counts frames in processes of their own, which a decoder may crash or hang.

decord 0.6.0 was seen to end its process over damaged clips, and is known to hang (its issue 154).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from sskt.teacher_cache.errors import MissingData, SsktError
from sskt.teacher_cache.media.video import Counted, count_frames

SILENT_SECONDS = 300.0
SECONDS_PER_BYTE = 2e-6
"""Without an answer for this long a clip is given up: a two-hour film takes minutes."""

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_SERVE = (
    "import sys; from sskt.teacher_cache.media.decord_worker import serve; serve(*sys.argv[1:])"
)


class Counter:
    """A process that counts frames. It starts when needed, and again after it died."""

    def __init__(self, decoder: str) -> None:
        self._decoder = decoder
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def count(self, path: Path) -> Counted:
        """``count_frames``; that a decoder crashes or hangs over a clip is the clip's ``problem``.

        Raises ``MissingData`` as ``count_frames`` does, ``SsktError`` where the process was ended
        by something else.
        """
        # twice: an earlier clip may have left the harm, and a stopped job answers late
        found = self._tried(path) or self._tried(path)
        return found or Counted(
            0, 0, f"{self._decoder} crashes or hangs over it; take --decoder pyav"
        )

    def close(self) -> None:
        """Ends the process, whatever it does. May be called from another thread than ``count``."""
        with self._lock:
            self._closed = True
            if self._running:
                self._running[0].kill()
                self._running[0].wait()

    def _tried(self, path: Path) -> Counted | None:
        process, pipe = self._started()
        try:
            pipe.send(str(path))
            answer = pipe.recv() if pipe.poll(_patience(path)) else None
        except (EOFError, ConnectionError):
            answer = None
            if -process.wait() not in _CRASHES:
                ended = f"the process that counted the frames of {path} was ended"
                raise SsktError(
                    f"{ended} (status {process.returncode}); run this again, with less beside it "
                    "if memory was short: what was counted is kept"
                ) from None
        if answer is None:
            self._end()
        if isinstance(answer, str):
            raise MissingData(answer)
        return answer

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        with self._lock:
            if self._closed:
                raise SsktError("counting was ended")
            if not self._running:
                ours, theirs = Pipe()
                handle = theirs.fileno()
                # -P: no module is taken from the working folder; an own session: Ctrl-C and
                # Ctrl-Z are the parent's, whose end of the pipe says when it is over
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _SERVE, str(handle), self._decoder],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[handle],
                    start_new_session=True,
                )
                theirs.close()
                self._running = process, ours
            return self._running

    def _end(self) -> None:
        with self._lock:
            if self._running:
                process, pipe = self._running
                process.kill()
                process.wait()
                pipe.close()
                self._running = None


def _patience(path: Path) -> float:
    try:
        return SILENT_SECONDS + SECONDS_PER_BYTE * path.stat().st_size
    except OSError:
        return SILENT_SECONDS


def serve(handle: str, decoder: str) -> None:
    """Answers paths with what was counted, or with the text of ``MissingData``, until the end."""
    with Connection(int(handle)) as pipe:
        while True:
            try:
                path = pipe.recv()
            except EOFError:
                return
            try:
                answer: Counted | str = count_frames(Path(path), decoder)
            except MissingData as error:
                answer = str(error)
            pipe.send(answer)
