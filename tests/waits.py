"""Ops by which the host would wait for a device, counted on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: They hand numbers to Python, or make a result whose size depends on numbers.
WAITS = frozenset(
    {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"}
    | {"unique", "_unique2", "unique_dim", "unique_consecutive", "argwhere"}
)


class Waits(TorchDispatchMode):
    """While entered, keeps the names of all such ops in `seen`, and counts all ops in `ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.ops = 0

    def __enter__(self) -> Waits:
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:  # on the CPU it is no op
            self.seen.append("tolist")
            return original(tensor)

        original = Tensor.tolist
        Tensor.tolist = tolist  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.ops += 1
        masks = [x for x in args[1] or () if isinstance(x, Tensor)] if name in ("index", "index_put_") else []
        if name in WAITS or any(mask.dtype is torch.bool for mask in masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
