"""Running scripts in processes of their own: reading what they write as they go, and leaving none behind.

Comparison and doctor both start a script several times. What a run says it appends to a file, line by line, so that
nothing is lost when it is killed; whoever started it follows that file.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil


def stop(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End a process and those it started, politely first; nothing to do where it has ended.

    Args:
        grace_seconds: between SIGTERM and SIGKILL.
    """
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=grace_seconds)
        for member in family:  # psutil checks that the pid has not been given to another process
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


class Tail:
    """The whole lines that have been appended to a file since it was last asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines_seen = 0
        self._offset = 0
        self._cut = b""

    def new_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(appended)
        *lines, self._cut = (self._cut + appended).split(b"\n")
        self.lines_seen += len(lines)
        return lines


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM, which would leave a started process behind as an orphan, into SystemExit, which stops it first."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:  # signals belong to the main thread, and a handler of the caller's knows better
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
