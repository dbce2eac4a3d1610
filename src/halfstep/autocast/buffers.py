"""A model's buffers as they were: their values, and which tensor is registered under which name.

A forward pass may write into a buffer, or put another tensor in its place (``self.ema = 0.9 * self.ema + …``), or
register one that was not there. Who runs a forward pass that is to leave no trace has to undo all three.
"""

from __future__ import annotations

from torch import Tensor, nn


class BufferSnapshot:
    """The buffers of modules as they were when they were kept."""

    def __init__(self) -> None:
        self._registered: dict[nn.Module, dict[str, Tensor | None]] = {}
        self._values: dict[Tensor, Tensor] = {}

    def keep(self, model: nn.Module) -> None:
        """Remember the buffers of ``model`` and of all modules in it, but of those that are kept already."""
        for part in model.modules():
            if part not in self._registered:
                self._registered[part] = dict(part._buffers)
                for buffer in part._buffers.values():
                    if buffer is not None and buffer not in self._values:
                        self._values[buffer] = buffer.detach().clone()

    def restore(self) -> None:
        """Put all of them back; they stay kept.

        Not by ``buffer.copy_``: a graph from before, whose backward is still to come, would find it modified.
        """
        for part, buffers in self._registered.items():
            part._buffers.clear()
            part._buffers.update(buffers)
        for buffer, value in self._values.items():
            buffer.data.copy_(value)
