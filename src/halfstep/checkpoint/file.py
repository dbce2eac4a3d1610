"""The file of a checkpoint: written beside its target, sealed with a checksum, renamed; verified before it is read.

The seal is the comment of the zip archive that torch.save writes. The archive's last record ends in the length of the
comment, zero as torch writes it, so that the last record is held back until the length can be set: nothing is read
again or written twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import IO, cast

import torch

from halfstep.checkpoint.error import CheckpointError

try:
    import fcntl

    _HAS_LOCKS = True
except ImportError:  # Windows: leftovers of killed processes stay until somebody removes them
    _HAS_LOCKS = False

_MARK = "halfstep checkpoint 1: {:020d} bytes, sha256 "
_MARK_PATTERN = re.compile(rb"halfstep checkpoint (\d+): (\d{20}) bytes, sha256 ")
_COMMENT_LENGTH = len(_MARK.format(0)) + 2 * hashlib.sha256().digest_size
_ZIP_START, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_ZIP_END_LENGTH = 22  #: of the zip's last record; its last two bytes are the length of the comment that follows
_CHUNK = 1 << 20  #: hashed and written at a time, so that the second of the two finds it in the cache


class _Sealing:
    """What torch.save writes to: hashes and passes on all but the last record, which `seal` writes with its comment."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._length = 0
        self._held = b""
        self.failure: BaseException | None = None  #: of a write: torch hides it behind an error of its own

    def write(self, data: bytes | memoryview) -> int:
        if self.failure is None:
            try:
                self._take(data)
            except BaseException as error:
                self.failure = error
        if self.failure is not None:  # again, too: torch goes on to end its archive
            raise self.failure
        return len(data)

    def _take(self, data: bytes | memoryview) -> None:
        arrived = memoryview(data).cast("B")
        if len(arrived) < _ZIP_END_LENGTH:
            arrived, self._held = memoryview(self._held + arrived), b""
        self._pass_on(memoryview(self._held))
        passed = max(len(arrived) - _ZIP_END_LENGTH, 0)
        self._pass_on(arrived[:passed])
        self._held = bytes(arrived[passed:])

    def flush(self) -> None:
        """Nothing to do: `seal` ends the file."""

    def seal(self) -> None:
        if not (self._held.startswith(_ZIP_END) and self._held.endswith(b"\0\0")):
            raise CheckpointError(f"torch {torch.__version__} ended its archive in {self._held!r}: please report this")
        size = self._length + _ZIP_END_LENGTH + _COMMENT_LENGTH
        end = self._held[:-2] + _COMMENT_LENGTH.to_bytes(2, "little") + _MARK.format(size).encode()
        self._pass_on(memoryview(end))
        self._file.write(self._hash.hexdigest().encode())

    def _pass_on(self, data: memoryview) -> None:
        self._length += len(data)
        for start in range(0, len(data), _CHUNK):
            self._hash.update(data[start : start + _CHUNK])
            self._file.write(data[start : start + _CHUNK])


def write(state: object, target: Path) -> None:
    _remove_leftovers(target)
    with _temporary(target) as (file, temporary):
        sealing = _Sealing(file)
        try:
            torch.save(state, cast("IO[bytes]", sealing))
        except BaseException as error:
            raise sealing.failure or error from None
        sealing.seal()
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that was private stays private
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        if not _HAS_LOCKS:
            file.close()  # Windows renames no open file
        temporary.replace(target)
    with contextlib.suppress(OSError):  # not every file system can; the new name may then outlive a power cut or not
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file in the folder of ``target``, locked so that it is no leftover, and gone at the end unless renamed."""
    while True:
        path = target.with_name(f"{_temporary_stem(target)}.{secrets.token_hex(4)}.tmp")
        # Not the tempfile module's: its files are readable by their owner only, also after the renaming.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                taken = _lock(file) is _Lock.ANOTHERS  # who takes it for a leftover, being quicker, and removes it
                if taken or os.fstat(descriptor).st_nlink == 0:
                    continue
                yield file, path
                return
        finally:
            path.unlink(missing_ok=True)


def _temporary_stem(target: Path) -> str:
    return f".{target.name[:40]}"  # a file name has at most 255 bytes


class _Lock(Enum):
    """Who holds a file's lock."""

    OURS = auto()  #: until the process ends, in whatever way, or the file is closed
    ANOTHERS = auto()
    NOBODYS = auto()  #: a system, or a file system, without locks


def _lock(file: IO[bytes]) -> _Lock:
    """Try to take the file's lock; who holds it then."""
    if not _HAS_LOCKS:
        return _Lock.NOBODYS
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.ANOTHERS
    except OSError:
        return _Lock.NOBODYS
    return _Lock.OURS


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote ``target``, each as large as it.

    Or a file whose name begins with the same 40 letters; files of living writers are locked.
    """
    pattern = re.compile(re.escape(_temporary_stem(target)) + r"\.[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):  # a folder that cannot be listed may still be written to
        for path in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
            # Gone meanwhile, or another user's. For writing: locks on NFS ask for it.
            with contextlib.suppress(OSError), path.open("r+b") as file:
                if _lock(file) is _Lock.OURS:
                    path.unlink()


def verify(file: IO[bytes], path: str | os.PathLike[str]) -> None:
    """Raise unless every byte of the file is as `save` wrote it."""
    size = os.fstat(file.fileno()).st_size
    again = "Take an older checkpoint, or copy this one again from where it was written"
    start = max(size - 2 * _COMMENT_LENGTH, 0)
    file.seek(start)
    tail = file.read()
    marks = list(_MARK_PATTERN.finditer(tail))
    if not marks:
        file.seek(0)
        raise CheckpointError(f"{path} {_without_mark(file.read(4), tail, size)}. {again}")
    version, expected = int(marks[-1][1]), int(marks[-1][2])
    if version != 1:
        raise CheckpointError(f"{path} has checkpoint format {version}, this halfstep reads 1: update halfstep")
    if size != expected:
        what = f"is cut short by {expected - size}" if size < expected else f"has {size - expected} too many"
        raise CheckpointError(f"{path} {what} bytes: it has {size}, and was written with {expected}. {again}")
    hashed, left = hashlib.sha256(), size - 2 * hashlib.sha256().digest_size
    file.seek(0)
    while left and (chunk := file.read(min(_CHUNK, left))):
        hashed.update(chunk)
        left -= len(chunk)
    recorded = file.read()
    if left or recorded != hashed.hexdigest().encode():
        raise CheckpointError(
            f"{path} is damaged: it has all of its {size} bytes, but not those that were written (SHA-256 "
            f"{hashed.hexdigest()[:16]}…, recorded {recorded[:16].decode(errors='replace')}…). {again}"
        )


def _without_mark(head: bytes, tail: bytes, size: int) -> str:
    """What a file is that does not end as checkpoints do."""
    if not size:
        return "is empty: 0 bytes"
    if head != _ZIP_START:
        return f"is not a checkpoint: it has {size} bytes, and begins with {head!r} instead of {_ZIP_START!r}"
    if tail[-_ZIP_END_LENGTH:].startswith(_ZIP_END) and tail.endswith(b"\0\0"):
        return (
            "was not written by halfstep.save and has no checksum, so that nothing can be verified. If torch.save "
            "wrote it, torch.load(path, weights_only=True) reads it as it is, and halfstep.save makes it a checkpoint"
        )
    return f"is cut short or damaged: its {size} bytes do not end in the checksum that ends every checkpoint"
