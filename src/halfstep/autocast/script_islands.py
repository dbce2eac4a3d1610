"""A policy's FP32 islands in a script whose modules are met one by one.

A pattern need not match every module that a script calls (a GAN has two), but it has to match one by the time of the
first optimizer step: a name with a typing error must not pass for an island through hours of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from halfstep.autocast.islands import Islands, NoSuchModuleError, find, keep_fp32, no_match


class ScriptIslands:
    """The islands made so far."""

    def __init__(self) -> None:
        self._made: list[Islands] = []
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._matched: set[str] = set()

    def apply(self, module: nn.Module, patterns: Sequence[str], device_type: str) -> None:
        """Make islands of what matches in ``module``; again for the same module does nothing new."""
        matching = [pattern for pattern in patterns if find(module, (pattern,))]
        self._matched.update(matching)
        if patterns:
            self._seen.add(module)
        if matching:
            self._made.append(keep_fp32(module, matching, device_type))

    def require(self, patterns: Sequence[str]) -> None:
        """Raises NoSuchModuleError for the first pattern that matched nothing yet, if any module was met."""
        for pattern in patterns:
            if pattern not in self._matched and self._seen:
                raise NoSuchModuleError(no_match(list(self._seen), pattern))

    def remove(self) -> None:
        for islands in self._made:
            islands.remove()
        self._made.clear()
