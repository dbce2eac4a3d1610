"""Which tensors of an FP32 run would be 16-bit: one tag per storage, by the rules of `halfstep.observe.lowering`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.utils._pytree import tree_leaves

from halfstep.observe.attribution import Attribution
from halfstep.observe.lowering import only_first, promoted, would_be_low
from halfstep.observe.place import Phase
from halfstep.policy import Policy
from halfstep.split import parts


class LowTags:
    """The tags of one run's tensors, and `would_be_low` asked with them for one op after another.

    A tag belongs to a storage: views and what autograd unpacks share it, and an address used again belongs to a new
    result, which is tagged anew. A gradient's format is its forward tensor's; the node that runs says which forward op
    that was. Nodes are numbered per thread; an `Attribution` that is entered, and asked for the place of every op,
    knows which thread made one. Without it they are taken to be of one thread, as on a CPU.
    """

    def __init__(self, policy: Policy, attribution: Attribution | None = None) -> None:
        self.policy = policy
        self._newest = _newest_node if attribution is None else attribution.newest_node
        self._running = _running_node if attribution is None else attribution.running_node
        self._low: dict[int, bool] = {}
        self._forward: dict[tuple[int, int] | None, bool] = {}  # by node, as `would_be_low` takes it

    def see(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any, phase: Phase) -> bool:
        """Tag the results of an op that has run, inside ``__torch_dispatch__``; whether they would be low."""
        inputs, outputs = _floating((args, kwargs)), _floating(result)
        if not outputs:
            return False
        inputs_low = [self._low.get(_key(x), False) for x in inputs]
        dims = [x.dim() for x in inputs]
        device_type = outputs[0].device.type
        forward = self._forward.get(self._running()) if phase == "backward" else None
        low = would_be_low(
            func,
            inputs_low,
            self.policy,
            phase=phase,
            dims=dims,
            dtype=kwargs.get("dtype"),
            device_type=device_type,
            forward_low=forward,
        )
        if phase == "forward" and torch.is_grad_enabled():
            self._forward.setdefault(self._newest(), low or promoted(inputs_low, dims))
        for output in outputs[: 1 if only_first(func) else None]:
            self._low[_key(output)] = low
        return low

    def is_low(self, tensor: Tensor) -> bool:
        """The tag of a tensor; what no op has made is not low."""
        return self._low.get(_key(tensor), False)


def _floating(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _key(tensor: Tensor) -> int:
    try:
        return int(parts(tensor)[0].untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return id(tensor)


def _newest_node() -> tuple[int, int]:
    return 0, int(_get_sequence_nr()) - 1


def _running_node() -> tuple[int, int] | None:
    """None outside of the engine and in nodes written in Python."""
    number = getattr(torch._C._current_autograd_node(), "_sequence_nr", None)
    return None if number is None else (0, int(number()))
