"""The one error of checkpoints: caught alone, it leaves every other mistake visible."""

from __future__ import annotations


class CheckpointError(ValueError):
    """This state cannot be saved, or this file not be trusted; the message says why and what to do.

    Where the operating system refused (disk full, no permission, no such file), its error is the ``__cause__``.
    """
