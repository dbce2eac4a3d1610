"""What a section is given: where to write, on which device, how large to be, and when to stop."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import records
from gpu.running import LINES, say

#: Lines of a traceback that are kept.
TRACEBACK = 14
#: A section ends this long before its limit by itself.
MARGIN = 2.0


class Section:
    """A running section. Device, size and folder are attributes; what it learns goes through its methods."""

    def __init__(self, name: str, out: Path, device: str, tiny: bool, limit: float) -> None:
        self.name, self.out, self.device, self.tiny = name, out, device, tiny
        self.cuda = device == "cuda"
        self.ends = time.monotonic() + limit - MARGIN

    def left(self) -> float:
        """Seconds until it has to have ended."""
        return self.ends - time.monotonic()

    def measure(self, name: str, **values: Any) -> None:
        self._write(name, "measure", **values)
        say(f"{name}: {records.short(values, 400)}")

    def check(self, name: str, ok: bool, **values: Any) -> None:
        self._write(name, "check", ok=ok, **values)
        say(f"{'ok    ' if ok else 'FAILED'} {name}: {records.short(values, 400)}")

    def note(self, name: str, **values: Any) -> None:
        self._write(name, "note", **values)

    def crashed(self, name: str, error: BaseException) -> None:
        where = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK:]
        self._write(name, "crash", error=f"{type(error).__name__}: {error}"[:600], where=where)
        traceback.print_exception(error)

    def _write(self, name: str, kind: str, **values: Any) -> None:
        records.append(self.out / LINES, self.name, name, kind, tiny=self.tiny, **values)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is written down and ends nothing else; the device's memory is free after it."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self.crashed(name, error)
            traceback.clear_frames(error.__traceback__)  # they hold the model
        finally:
            say(f"    {name}: {time.monotonic() - began:.1f} s")
            release_memory()

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether a part that takes so many seconds on a GPU can begin; if not, that is written down."""
        seconds = min(seconds, 1.0) if self.tiny else seconds
        if not self.cuda or self.left() >= seconds:
            return True
        self.note(name, status="not run: too little time left", needs=seconds, left=round(self.left(), 1))
        return False


def release_memory() -> None:
    """Give the device's memory back, and forget its peak."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
