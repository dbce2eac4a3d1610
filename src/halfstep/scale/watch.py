"""What a scaler sees of an iteration: its losses, and of a model that it is shown, inputs and buffers.

A scaler by itself sees losses and gradients. `Watch.model` adds a hook before and one after a model's forward pass,
which remember its inputs (weakly: they are not kept alive) and its buffers. The hooks die with the scaler, and copies
and pickles of the model do not carry them.

Within `Watch.forward_of` a forward pass belongs to the step that is made there, whoever else watches the model: the
discriminator's, in a generator's step, is part of that one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from halfstep.scale.buffers import KeptBuffers
from halfstep.scale.diagnosis import Cause, diagnose

_here = threading.local()  # the watch whose step the code within `forward_of` belongs to


class Watch:
    """The losses and the models that a scaler was shown, and what it saw of them since the last update.

    Args:
        scales: whether the scaler is enabled; else there is nothing to diagnose.

    Attributes:
        keeps: whether steps may be skipped, and buffers are remembered for that.
    """

    def __init__(self, *, scales: bool) -> None:
        self.buffers = KeptBuffers()
        self.keeps = self._scales = scales
        self._cause: Cause | None = None
        self._saw_all = False
        # Bounded, should a script never call update.
        self._losses: deque[Tensor] = deque(maxlen=256)
        # No weak references to parameters: PyTorch exchanges none that has one (`torch.utils.swap_tensors`).
        self._models: list[weakref.ref[nn.Module]] = []
        self._replicated: dict[int, weakref.ref[nn.Module]] = {}  # ids of parameters, and whose they are
        self._inputs: deque[weakref.ref[Tensor]] = deque(maxlen=256)

    def model(self, model: nn.Module) -> None:
        """Look at ``model`` before and after each of its forward passes."""
        self._models = [each for each in self._models if each() is not None] + [weakref.ref(model)]
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._replicated |= {id(parameter): weakref.ref(model) for parameter in model.parameters()}
        before = model.register_forward_pre_hook(_Look(weakref.ref(self)), with_kwargs=True)
        after = model.register_forward_hook(_LookAfter(weakref.ref(self)))
        weakref.finalize(self, before.remove)
        weakref.finalize(self, after.remove)

    @contextlib.contextmanager
    def forward_of(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of ``model``, of its parts, and of any watched model, belong to this watch's step."""
        outer = getattr(_here, "watch", None)
        keeps = self.keeps and torch.is_grad_enabled()
        _here.watch = self
        try:
            if keeps:
                self.buffers.keep(model)
            yield
        finally:
            _here.watch = outer
            if keeps:
                self.buffers.wrote(model)

    def seen_through(self, loss: Tensor) -> Tensor:
        """``loss``, whose backward pass tells the buffers of its end."""
        if loss.requires_grad and self.buffers.are_kept():
            buffers = weakref.ref(self.buffers)

            def ended() -> None:
                if (kept := buffers()) is not None:
                    kept.after_backward()

            def starts(gradient: Tensor) -> None:
                torch.autograd.Variable._execution_engine.queue_callback(ended)

            loss.register_hook(starts)  # type: ignore[no-untyped-call,unused-ignore]
        return loss

    def inputs(self, values: Iterable[Any]) -> None:
        """Remember the floating tensors among ``values``, weakly, until the next update."""
        for value in values if self._scales else ():
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

    def name_of(self, parameter: Tensor, optimizer: torch.optim.Optimizer) -> str:
        """The parameter's name, from the model, or from the optimizer; its place in the optimizer without either."""
        for model in self._models:
            for name, other in model().named_parameters() if model() is not None else ():  # type: ignore[union-attr]
                if other is parameter:
                    return f"parameter {name!r}"
        for index, group in enumerate(optimizer.param_groups):
            for place, other in enumerate(group["params"]):
                if other is parameter:
                    names = group.get("param_names")
                    return f"parameter {names[place]!r}" if names else f"parameter {place} of parameter group {index}"
        return "a parameter"

    def is_replicated(self, parameter: Tensor) -> bool:
        """Whether DistributedDataParallel keeps this parameter's gradient the same on all ranks."""
        model = self._replicated.get(id(parameter))
        return model is not None and model() is not None

    def _alive(self) -> list[Tensor]:
        return [value for reference in self._inputs if (value := reference()) is not None]


def _owner(watch: weakref.ref[Watch] | None) -> tuple[Watch, Watch] | None:
    """Who watches, and whose step this forward pass belongs to; None where it belongs to none."""
    if torch.compiler.is_compiling() or watch is None or not torch.is_grad_enabled():
        return None
    ours = watch()
    if ours is None or torch._C._current_graph_task_id() != -1:  # in backward: checkpointing recomputes
        return None
    return ours, getattr(_here, "watch", None) or ours


class _Look:
    """The hook before. Holds the watch weakly, and becomes inert in copies and pickles of the model."""

    def __init__(self, watch: weakref.ref[Watch] | None = None) -> None:
        self._watch = watch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if (found := _owner(self._watch)) is not None:
            watch, owner = found
            watch.inputs(tree_leaves((args, kwargs)))
            if owner.keeps:
                owner.buffers.keep(model)

    def __reduce__(self) -> Any:
        return (type(self), ())

    def __deepcopy__(self, memo: Any) -> _Look:
        return type(self)()


class _LookAfter(_Look):
    """The hook after."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if (found := _owner(self._watch)) is not None and found[1].keeps:
            found[1].buffers.wrote(model)
