"""Where an op runs: what a reader needs to open the right file at the right line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: forward: under a module or a plain line of code · backward: inside autograd's engine · optimizer: inside an
#: optimizer's ``step``.
Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Place:
    """One op at one line, in one module and phase."""

    op: str  #: PyTorch's name without namespace and overload: ``mm``, ``_foreach_addcdiv_``
    phase: Phase = "forward"
    module: str = ""  #: dotted path from the outermost module called; its class where that is the module itself
    module_type: str = ""  #: class of the module at ``module``; empty outside of modules
    file: str | None = None  #: of the line that called PyTorch; in backward, of the forward line it belongs to
    line: int | None = None
    parameter: str | None = None  #: whose gradient or update this is

    def __str__(self) -> str:
        """``mm in blocks.3.mlp.wo (Linear), backward, train.py:41``."""
        where = f"{self.op} in {self.module}" if self.module else self.op
        if self.module_type and self.module_type != self.module:
            where += f" ({self.module_type})"
        if self.parameter:
            where += f", parameter {self.parameter}"
        if self.phase != "forward":
            where += f", {self.phase}"
        return where if self.file is None else f"{where}, {self.file}:{self.line}"
