"""Loss scaling around an unmodified script: scaled losses in, unscaled gradients out.

Backward starts from the loss times the scale. Each leaf's gradient is divided by the scale as it arrives, by a tensor
hook that runs before all others and before accumulation, so the script never finds a scaled gradient in ``.grad``: its
own clipping, norms and accumulation need not know. That costs no range, because under a mixed policy parameters and
their gradients are FP32. The same pass looks for inf and NaN.

The scale moves at the start of a backward, by what happened since the one before: steps that were made or skipped, or
an overflow after which the script itself did not step (``if isfinite(norm): optimizer.step()``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from halfstep.autocast import LOW_PRECISION
from halfstep.scale import GradScaler
from halfstep.scale.graph import leaf_of, nodes

Original = Callable[..., Any]


class OverflowInClosure(Exception):  # noqa: N818  # control flow out of an optimizer's step, never seen outside
    """A closure's gradients overflowed: the step that evaluates it has to be abandoned."""


class ScriptScaling:
    """The loss scale of a script, and the hooks on its leaves."""

    def __init__(self) -> None:
        self._scaler: GradScaler | None = None
        self._handles: list[RemovableHandle] = []
        self._prune_at = 256
        self._inverse: Tensor | None = None  # 1 / scale, while a scaled backward runs
        self._found_inf: Tensor | None = None  # of the gradients that arrived since the scale last moved
        self._steps_since = False
        self._backed_off_early = False
        self._inputs: list[weakref.ref[Tensor]] = []  # of the forward passes since the last backward

    @property
    def scale(self) -> Tensor | None:
        """The present loss scale, float32 0-d on its device; None before the first backward."""
        return None if self._scaler is None else self._scaler._scale

    def uses(self, scaler: object) -> bool:
        """Whether ``scaler`` is the one that works here."""
        return scaler is self._scaler

    def hook(self, tensors: Iterable[Any]) -> None:
        """Unscale what arrives at these leaves from now on; anything else among ``tensors`` is left alone.

        Whether a leaf has the hook is read off the leaf: a weak reference to it would keep PyTorch from exchanging what
        it is (``model.float()``, a parametrization), and an exchanged leaf may have lost its hooks.
        """
        for tensor in tensors:
            if (
                isinstance(tensor, Tensor)
                and tensor.requires_grad
                and tensor.is_leaf
                and tensor.dtype not in LOW_PRECISION
                and self._arriving not in (tensor._backward_hooks or {}).values()
            ):
                handle: RemovableHandle = tensor.register_hook(self._arriving)  # type: ignore[no-untyped-call]  # torch lacks it
                _put_first(tensor._backward_hooks, handle.id)  # a hook of the script's sees it unscaled
                self._handles.append(handle)
        if len(self._handles) > self._prune_at:  # inputs that want a gradient are new leaves in each step
            self._handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
            self._prune_at = 2 * len(self._handles) + 256

    def note_inputs(self, values: Iterable[Any]) -> None:
        """Data of a forward pass, for the diagnosis of a skip; they are not kept alive."""
        self._inputs += [weakref.ref(value) for value in values if isinstance(value, Tensor)]

    def backward(
        self, original: Original, roots: Sequence[Tensor], given: Sequence[Tensor | None], *args: Any, **kwargs: Any
    ) -> Any:
        """``original`` from scaled roots."""
        self.hook(_leaves(roots))
        if self._scaler is None:
            self._scaler = GradScaler(roots[0].device.type)
            self._scaler.scale(
                torch.zeros((), dtype=torch.float32, device=roots[0].device)
            )  # makes its tensors on this device
        scaler = self._scaler
        self._settle(scaler)
        scaler.note_inputs(reference() for reference in self._inputs)
        self._inputs.clear()
        scale = scaler._scale
        assert scale is not None  # made above
        scaled_roots: list[Tensor] = []
        scaled_given: list[Tensor | None] = []
        for root, gradient in zip(roots, given, strict=True):
            wide = root.float() if root.dtype in LOW_PRECISION else root
            scaled_roots.append(scaler.scale(wide) if gradient is None else wide)
            scaled_given.append(
                None if gradient is None else gradient.to(wide.dtype) * scale.to(gradient.device, non_blocking=True)
            )
        device = roots[0].device
        self._inverse = scale.to(device, non_blocking=True).reciprocal()
        if self._found_inf is None:
            self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        try:
            return original(scaled_roots, scaled_given, *args, **kwargs)
        finally:
            self._inverse = None

    def overflowed(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's gradients hold inf or NaN; a step is made or skipped by the answer."""
        scaler = self._scaler
        if scaler is None or not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return False
        scaler.check_unscaled(optimizer)
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        skip = any(bool(found_inf.item()) for found_inf in found.values())
        if skip and self._backed_off_early:  # this overflow has moved the scale already
            scaler._per_optimizer_states.pop(id(optimizer))
        else:
            self._steps_since = True
        if skip:
            scaler.cause_of_skip()  # now: when the scale moves, this batch will be gone
        self._backed_off_early = False
        return skip

    def guarded(self, optimizer: Optimizer, closure: Callable[[], Any], evaluated: list[Any]) -> Callable[[], Any]:
        """``closure`` that raises `OverflowInClosure` instead of handing bad gradients to the optimizer."""

        def checked() -> Any:
            evaluated[:] = [closure()]
            if self.overflowed(optimizer):
                raise OverflowInClosure
            return evaluated[0]

        return checked

    def close(self) -> None:
        """Take the hooks off the script's tensors."""
        for handle in self._handles:
            handle.remove()

    def _settle(self, scaler: GradScaler) -> None:
        found = self._found_inf
        if self._steps_since:
            scaler.update()
        elif found is not None and bool(found.item()):
            # The script saw the overflow itself and did not step; without this the scale would never come down.
            scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = {found.device: found.clone()}
            scaler.update()
            self._backed_off_early = True
        else:
            return
        self._steps_since = False
        if found is not None:
            found.zero_()

    def _arriving(self, gradient: Tensor) -> Tensor:
        inverse, found = self._inverse, self._found_inf
        if inverse is None or found is None:  # torch.autograd.grad, or another loss's own backward
            return gradient
        on_device = inverse.to(gradient.device)
        if gradient.requires_grad or gradient.is_sparse or gradient.is_complex() or gradient.device != found.device:
            unscaled = gradient * on_device
            values = unscaled.detach().coalesce().values() if unscaled.is_sparse else unscaled.detach()
            found += (~torch.isfinite(values)).any().to(found.device)
            return unscaled
        unscaled = gradient.clone()
        torch._amp_foreach_non_finite_check_and_unscale_([unscaled], found, on_device)
        return unscaled


def scale_of(scaler: torch.amp.GradScaler) -> Tensor | float:
    """A scaler's present scale where it is: ``get_scale()`` waits for the device."""
    return scaler.get_scale() if scaler._scale is None else scaler._scale


def _put_first(hooks: MutableMapping[int, Any] | None, key: int) -> None:
    assert hooks is not None  # register_hook made it
    others = [(other, hook) for other, hook in hooks.items() if other != key]
    first = hooks[key]
    # Autograd walks the plain dict inside the OrderedDict, so move_to_end would change nothing for it.
    hooks.clear()
    hooks[key] = first
    hooks.update(others)


def _leaves(roots: Sequence[Tensor]) -> Iterable[Tensor]:
    """The leaf tensors of the graph behind ``roots``: also those that no optimizer or module holds."""
    return [leaf for node in nodes(roots) if (leaf := leaf_of(node)) is not None]
