"""What a scaler sees of an iteration: its losses, and of a model that it is shown, inputs and running statistics.

A scaler by itself sees losses and gradients. `Watch.model` adds one hook to a model, before its forward pass, which
remembers its inputs (weakly: they are not kept alive) and its running statistics. The hook dies with the scaler, and
copies and pickles of the model do not carry it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from halfstep.scale.diagnosis import Cause, diagnose
from halfstep.scale.statistics import KeptStatistics


class Watch:
    """The losses and the models that a scaler was shown, and what it saw of them since the last update."""

    def __init__(self) -> None:
        self.statistics = KeptStatistics()
        self._cause: Cause | None = None
        self._saw_all = False
        # Bounded, should a script never call update.
        self._losses: deque[Tensor] = deque(maxlen=256)
        self._names = WeakIdKeyDictionary()
        self._replicated = WeakIdKeyDictionary()
        self._inputs: deque[weakref.ref[Tensor]] = deque(maxlen=256)

    def model(self, model: nn.Module) -> None:
        """Look at ``model`` before each of its forward passes."""
        for name, parameter in model.named_parameters():
            self._names[parameter] = name
            if isinstance(model, nn.parallel.DistributedDataParallel):
                self._replicated[parameter] = True
        handle = model.register_forward_pre_hook(_Look(weakref.ref(self)), with_kwargs=True)
        weakref.finalize(self, handle.remove)

    def inputs(self, values: Iterable[Any]) -> None:
        """Remember the floating tensors among ``values``, weakly, until the next update."""
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter):
                self._inputs.append(weakref.ref(value))

    def loss(self, loss: Tensor) -> None:
        """Remember a loss, as it is before scaling."""
        self._losses.append(loss.detach())

    def saw_inputs(self) -> bool:
        """Whether all inputs of this iteration exist (or did when the cause was looked for): nothing was missed."""
        return self._saw_all if self._cause is not None else 0 < len(self._alive()) == len(self._inputs)

    def cause(self) -> Cause:
        """Why this iteration's step is skipped; looked for once, best as soon as the host learns that it is."""
        if self._cause is None:
            self._saw_all = self.saw_inputs()
            self._cause = diagnose(self._losses, self._alive())
        return self._cause

    def forget(self) -> None:
        """A new iteration begins."""
        self._cause = None
        self._losses.clear()
        self._inputs.clear()
        self.statistics.forget()

    def name_of(self, parameter: Tensor, optimizer: torch.optim.Optimizer) -> str:
        """The parameter's name, from the model, or from the optimizer; its place in the optimizer without either."""
        if parameter in self._names:
            return f"parameter {self._names[parameter]!r}"
        for index, group in enumerate(optimizer.param_groups):
            for place, other in enumerate(group["params"]):
                if other is parameter:
                    names = group.get("param_names")
                    return f"parameter {names[place]!r}" if names else f"parameter {place} of parameter group {index}"
        return "a parameter"

    def is_replicated(self, parameter: Tensor) -> bool:
        """Whether DistributedDataParallel keeps this parameter's gradient the same on all ranks."""
        return parameter in self._replicated

    def _alive(self) -> list[Tensor]:
        return [value for reference in self._inputs if (value := reference()) is not None]


class _Look:
    """The hook. Holds the watch weakly, and becomes inert in copies and pickles of the model."""

    def __init__(self, watch: weakref.ref[Watch] | None = None) -> None:
        self._watch = watch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._watch is None or not torch.is_grad_enabled():
            return
        watch = self._watch()
        if watch is None or torch._C._current_graph_task_id() != -1:  # in backward: checkpointing recomputes
            return
        watch.inputs(tree_leaves((args, kwargs)))
        if model.training:
            watch.statistics.keep(model)

    def __reduce__(self) -> Any:
        return (_Look, ())

    def __deepcopy__(self, memo: Any) -> _Look:
        return _Look()
