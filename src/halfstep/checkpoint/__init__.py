"""Checkpoints that are whole or refused: `save` and `load`.

A long run is resumed from files that were written while machines died under it. What goes wrong is known: a file cut
short, a byte flipped on the way to another disk, a write that stopped halfway over the only good copy, a pickle that
runs code. So a checkpoint is written beside its target, brought to the disk, and renamed over it; it ends in its own
size and SHA-256; and no byte of it is unpickled before all of them are verified, nor then anything but tensors and
plain values (``torch.load(weights_only=True)``).

The file is what `torch.save` writes, a zip archive, with 122 bytes of text in the place that the zip format has for a
comment::

    archive of torch.save ┊ halfstep checkpoint 1: 00000000000000004711 bytes, sha256 9f86d081…

so ``torch.load(path, weights_only=True)`` reads it too, without the verification. The digest is that of every byte
before it: ``head -c -64 FILE | sha256sum`` prints the last 64 characters of the file. (A file beside the checkpoint
would be lost or mixed up, a record inside the archive would have to be written before what it sums up.)

`save` streams: it hashes what it writes, and copies no tensor but small views of large storages, of which only the
part seen is stored. Tensors that share memory share it after loading. The zip format: PKWARE's APPNOTE.TXT, 4.3.16.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import MAP_LOCATION

from halfstep.checkpoint.contents import storable
from halfstep.checkpoint.error import CheckpointError
from halfstep.checkpoint.file import verify, write

__all__ = ["CheckpointError", "load", "save"]

_REMEDIES = {
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "create the folder first",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EACCES: "get permission to write in its folder",
    errno.EROFS: "save to a file system that can be written",
}


def save(state: object, path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path``, whole or not at all.

    A file that was there is replaced in one step when the new one is on the disk: whatever happens before, full disk
    or killed process included, leaves the old one. A symbolic link is followed.

    Args:
        state: tensors and plain values in dicts, lists and tuples, nested at will: the state dicts of models,
            optimizers, schedulers and `halfstep.MixedPrecision`. Saved as they are: dtypes, strides, tied tensors. (A
            view that skips most of its memory is stored without what it skips: its dimensions then lie in the same
            order, closer together.)
        path: the file; its folder must exist.

    Raises:
        CheckpointError: the state holds something that loading without code could not give back (before anything
            is written; the message has its place in the state), or the file cannot be written.

    Example:
        >>> halfstep.save({"model": model.state_dict(), "mp": mp.state_dict(), "step": step}, "run.pt")
    """
    try:
        _check_name(path)
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():  # renaming over /dev/null would be the end of /dev/null
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise CheckpointError(f"{path} is {kind}: give the path of a file to write")
        with torch.no_grad():
            write(storable(state), target)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "save elsewhere")
        raise CheckpointError(
            f"{path} was not written: {error.strerror or error}: {remedy}. A file that was there before is as it was"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path} was not written: the state is nested too deeply; flatten it") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} was not written: torch.save refused the state: {error}") from error


def load(path: str | os.PathLike[str], map_location: MAP_LOCATION = "cpu") -> Any:
    """The state that `save` wrote to ``path``, after all of the file was verified.

    Args:
        path: a file written by `save`.
        map_location: where tensors go, as for `torch.load`. The default is the CPU, from where ``load_state_dict``
            copies to wherever the model is, and not each tensor's own device, which this machine may lack and on
            which the state would lie a second time.

    Raises:
        CheckpointError: there is no such file, it was not written by `save`, it is not whole, or unpickling it would
            run code, or gives no state.
    """
    try:
        _check_name(path)
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise CheckpointError(f"{path} is {kind}: give the path of a file that halfstep.save wrote")
        with Path(path).open("rb") as file:
            verify(file, path)
            file.seek(0)
            return _unpickled(file, path, map_location)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _unpickled(file: IO[bytes], path: str | os.PathLike[str], map_location: MAP_LOCATION) -> Any:
    """The state in a file that was verified. That is no signature: whatever is wrong within ends in one error."""
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):  # of this machine, not of the file
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is whole, but holds more than tensors and plain values, and unpickling that may run code: "
            "halfstep.save writes no such file, so do not trust this one"
        ) from error
    except Exception as error:
        place = "" if map_location == "cpu" else f", or map_location={map_location!r} cannot be served here"
        raise CheckpointError(
            f"{path} is whole, but torch.load makes no state of it ({type(error).__name__}: {error}): halfstep.save "
            f"writes no such file, so do not trust this one{place}"
        ) from error


def _check_name(path: str | os.PathLike[str]) -> None:
    try:
        wrong = "holds the character NUL" if b"\0" in os.fsencode(path) else ""
    except UnicodeEncodeError as error:
        wrong = f"cannot be written in this system's encoding ({error})"
    if wrong:
        raise CheckpointError(f"the path {os.fspath(path)!r} {wrong}, and no file can have such a name: give another")
