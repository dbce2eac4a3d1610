"""What happens where an unmodified script passes through PyTorch's entry points.

The outermost module call runs in autocast and hands its outputs back in FP32; ``scaling`` scales the loss and unscales
gradients as they arrive; an optimizer's step is made, made on masters, or skipped; ``steps`` records it.

What the script already does itself (autocast, a GradScaler, 16-bit parameters) is left to it, and named in a notice.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from halfstep import hardware
from halfstep.autocast import LOW_PRECISION, autocast, recomputation, store_in_planes, to_float32
from halfstep.autocast.script_islands import ScriptIslands
from halfstep.launch.devices import ScriptDevices
from halfstep.launch.float32 import HeldFloat32
from halfstep.launch.own import OwnPrecision, caller, dtype_name, in_backward, makes_state_only
from halfstep.launch.reading import OnDevice
from halfstep.launch.scaling import OverflowInClosure, ScriptScaling, scale_of
from halfstep.launch.steps import StepObserver
from halfstep.optim import MasterOptimizer, MasterWeights
from halfstep.optim.fused_on_planes import in_one_pass
from halfstep.optim.loading import STALE, load_beside_masters
from halfstep.policy import Policy
from halfstep.record import Memory, Notice, Step
from halfstep.scale import KeptBuffers
from halfstep.split import NarrowGradients, make_plain

Original = Callable[..., Any]


class UnsupportedError(RuntimeError):
    """A policy cannot be applied to this script from outside; the message says what can be done."""


class Watcher(Protocol):
    """Is told of what happens in a session, from inside of it; whatever it raises ends the script."""

    def forward_starts(self, module: nn.Module) -> None:
        """An outermost module, one with parameters, is about to be called."""

    def forward_ended(self) -> None: ...

    def backward_ended(self) -> None: ...

    def step_starts(self, optimizer: Optimizer) -> None:
        """Gradients are there, and the script's own (unscaled) if it does not scale its loss itself."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds what the session itself computes, which is none of the script's numbers."""


class Session:
    """One script under one policy, from its first to its last step.

    Args:
        requested: what was asked for, "auto" included.
        policy: the policy in effect.
        device_type: the device the policy was chosen for.
        write: takes each step, memory measurement and notice.
        step_limit: end the script (`StepLimitReached`) after so many steps of its first optimizer.
    """

    def __init__(
        self,
        requested: str,
        policy: Policy,
        device_type: str,
        write: Callable[[Step | Memory | Notice], None],
        step_limit: int | None = None,
    ) -> None:
        self.requested = requested
        self.policy = policy
        self.device_type = device_type
        self.steps = StepObserver(write, step_limit)
        self.backwards_seen = 0
        self.forwards_seen = 0
        self._write = write
        self._local = threading.local()
        self._noticed: set[str] = set()
        # Standing back is per module; an own GradScaler ends our scaling altogether.
        self._known_modules: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.stepped: weakref.WeakKeyDictionary[Optimizer, list[int]] = weakref.WeakKeyDictionary()
        self._schedulers: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._masters: weakref.WeakKeyDictionary[Optimizer, MasterWeights] = weakref.WeakKeyDictionary()
        self.own = OwnPrecision(self)
        self.float32 = HeldFloat32(self)
        self.devices = ScriptDevices(self)
        self.watcher: Watcher | None = None
        self.entering_ours = False
        self._scaling = ScriptScaling()
        self._buffers = KeptBuffers()
        self._islands = ScriptIslands()
        self._narrow: list[NarrowGradients] = []
        self._narrowed: set[int] = set()

    # ------------------------------------------------------------------ forward

    def forward(self, original: Original, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The outermost module call: autocast around it, FP32 out of it."""
        if getattr(self._local, "in_module", False):
            return original(module, *args, **kwargs)
        self._local.in_module = True
        keeps = False
        try:
            if not _is_a_models_call(module):
                return original(module, *args, **kwargs)
            first = next(module.parameters(), None)
            if first is None:  # a loss, a pooling, an augmentation: nothing to gain in 16 bits, and losses want FP32
                return original(module, *args, **kwargs)
            device_type = first.device.type
            if device_type not in hardware.DEVICE_TYPES:  # meta: shapes without numbers, no format to choose
                return original(module, *args, **kwargs)
            self.forwards_seen += 1
            self.devices.met(first.device)
            self.float32.hold()
            if self.watcher is not None and not in_backward():
                self.watcher.forward_starts(module)
            # In backward a module call is a recomputation. What was checkpointed inside a module finds the
            # forward's autocast restored and passes; what was checkpointed outside one is an outermost call again.
            if self._stands_back(module) or torch.is_autocast_enabled(device_type):
                return original(module, *args, **kwargs)
            if self.scales_loss and torch.is_grad_enabled() and not in_backward():
                self._scaling.note_inputs(tree_leaves((args, kwargs)))
                keeps = True
                self._buffers.keep(module)
            if not self.policy.lowers:
                return original(module, *args, **kwargs)
            with self._our_autocast(device_type):
                result = original(module, *args, **kwargs)
            return to_float32(result)
        finally:
            self._local.in_module = False
            if keeps:
                self._buffers.wrote(module)
            if self.watcher is not None and not in_backward():
                self.watcher.forward_ended()

    # ------------------------------------------------------------------ backward

    def backward(self, original: Original, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.backward``, of a scaled loss where the policy scales."""
        if in_backward():
            return original(tensors, grad_tensors, *args, **kwargs)
        self.backwards_seen += 1
        self.float32.hold()
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, Tensor) or grad_tensors is None else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        scaler = self.own.scaler
        with self.aside():
            self.steps.loss(roots, given, 1.0 if scaler is None else scale_of(scaler))
        with contextlib.ExitStack() as stack:
            if self.watcher is not None:
                stack.callback(self.watcher.backward_ended)
            stack.enter_context(recomputation(self.policy, self.device_type))
            if not self.scales_loss:
                return original(tensors, grad_tensors, *args, **kwargs)
            if any(optimizer.release is not None for optimizer in self._holding_masters()):
                raise UnsupportedError(
                    f"{self.policy} cannot be put under an optimizer with release_gradients=True from outside: it has "
                    "stepped before all gradients are known to be finite. Use halfstep.MixedPrecision, or bf16-mixed"
                )
            for optimizer in list(self.stepped):  # a parameter may be kept from this graph and stepped all the same
                self._scaling.hook(p for group in optimizer.param_groups for p in group["params"])
            self._buffers.before_backward(roots)
            stack.callback(self._buffers.after_backward)
            return self._scaling.backward(original, roots, given, *args, **kwargs)

    # ------------------------------------------------------------------ optimizer and scheduler

    def new_parameters(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        """An optimizer was given parameters."""
        parameters = list(parameters)
        self.stepped.setdefault(optimizer, [0, 0])
        if self.policy.loss_scaling and any(hasattr(p, "to_local") for p in parameters):
            raise UnsupportedError(
                f"{self.policy} cannot be put under sharded (DTensor) parameters from outside: use bf16-mixed, or "
                "halfstep.MixedPrecision in the loop"
            )
        self._known_modules.clear()  # a module seen before its optimizer has to be looked at again

    def step(self, original: Original, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """An optimizer's ``step``: applied, or skipped when scaled gradients overflowed."""
        if getattr(self._local, "in_step", False) or self.own.stepping:  # which records, once it knows of a skip
            return original(optimizer, *args, **kwargs)
        if not optimizer.state and makes_state_only():
            return original(optimizer, *args, **kwargs)
        self.float32.hold()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self.aside():
            grad_norm = self.steps.norm(parameters)
        if self.watcher is not None:
            self.watcher.step_starts(optimizer)
        self.steps.starts(parameters)
        self._local.in_step = True
        try:
            with in_one_pass(optimizer):
                result, applied, scale = self._stepped_by_policy(original, optimizer, args, kwargs)
        finally:
            self._local.in_step = False
        if grad_norm is None:  # a closure has made the gradients only now
            with self.aside():
                grad_norm = self.steps.norm(parameters)
        self.ended(optimizer, grad_norm, scale, not applied)
        return result

    def scheduler_step(self, original: Original, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """A scheduler's ``step``: held where every optimizer step since its last one was skipped."""
        optimizer = getattr(scheduler, "optimizer", None)
        starting = not hasattr(scheduler, "_last_lr")  # the constructor takes the first step itself
        if getattr(self._local, "in_scheduler", False) or optimizer is None or starting:
            return original(scheduler, *args, **kwargs)
        attempted, applied = self.stepped.get(optimizer, [0, 0])
        before_attempted, before_applied = self._schedulers.get(scheduler, [0, 0])
        self._schedulers[scheduler] = [attempted, applied]
        if attempted > before_attempted and applied == before_applied:
            return None
        self._local.in_scheduler = True
        try:
            return original(scheduler, *args, **kwargs)
        finally:
            self._local.in_scheduler = False

    def optimizer_state(self, original: Original, optimizer: Optimizer) -> dict[str, Any]:
        """``Optimizer.state_dict``, with the masters in it: the script's checkpoints then lose nothing."""
        masters = self._masters.get(optimizer)
        if masters is None or not len(masters) or getattr(self._local, "in_state", False):
            return dict(original(optimizer))
        self._local.in_state = True
        try:
            return masters.state_dict()
        finally:
            self._local.in_state = False

    def load_optimizer_state(self, original: Original, optimizer: Optimizer, state_dict: dict[str, Any]) -> Any:
        """``Optimizer.load_state_dict``, with masters, and without casting FP32 state to 16 bits."""
        if getattr(self._local, "in_state", False):
            return original(optimizer, state_dict)
        masters = self._masters.get(optimizer)
        self._local.in_state = True
        try:
            if masters is not None:
                return masters.load_state_dict(state_dict)
            if isinstance(optimizer, MasterOptimizer) or not {"state", "param_groups"} <= state_dict.keys():
                return original(optimizer, state_dict)
            if stale := load_beside_masters(optimizer, state_dict, lambda state: original(optimizer, state)):
                self.notice("stale-masters", STALE.format(", ".join(stale)), caller())
        finally:
            self._local.in_state = False

    def clipped(self, original: Original, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        """``clip_grad_norm_``: its norm is the one before clipping, which the record wants."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = original(parameters, *args, **kwargs)
        norm_type = args[1] if len(args) > 1 else kwargs.get("norm_type", 2.0)
        if float(norm_type) == 2.0:
            self.steps.clipped(parameters, norm)
        return norm

    def close(self) -> None:
        """Leave nothing behind: hooks on the script's tensors go, a started memory measurement ends."""
        self.steps.close()
        self._islands.remove()
        for narrow in self._narrow:
            narrow.remove()
        self._scaling.close()

    # ------------------------------------------------------------------ helpers, in the order of their first use

    @property
    def scales_loss(self) -> bool:
        return self.policy.loss_scaling and self.own.scaler is None

    @contextlib.contextmanager
    def _our_autocast(self, device_type: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self.entering_ours = True
            try:
                stack.enter_context(autocast(self.policy, device_type))
            finally:
                self.entering_ours = False
            yield

    def _stands_back(self, module: nn.Module) -> bool:
        """Whether ``module`` brings its own 16-bit parameters; looks at it once, and prepares it."""
        known = self._known_modules.get(module)
        if known is not None:
            return known
        parameters = list(module.named_parameters())
        kept = _parameters(self._holding_masters())  # not lossy; and the policy's doing only if it keeps 16 bits itself
        mastered = set()
        if self.policy.storage == "split":
            self._give_masters()
            mastered = _parameters(self._masters.values()) | kept
        low = [(name, p) for name, p in parameters if p.dtype in LOW_PRECISION and id(p) not in mastered]
        trainable_float32 = any(p.requires_grad and p.dtype is torch.float32 for _, p in parameters)
        own_low_precision = bool(low) and not trainable_float32
        lossy = [(name, p) for name, p in low if id(p) not in kept]
        if any(p.requires_grad for _, p in lossy):
            name, first = lossy[0]
            self.notice(
                "own-16-bit-parameters",
                f"{len(lossy)} of {len(parameters)} parameters of {type(module).__name__} are "
                f"{dtype_name(first.dtype)} already (first: {name}) and have no FP32 masters, so small updates "
                "to them are lost. Create the model in float32 and let the policy choose",
                name,
            )
        if not own_low_precision:
            self._prepare(module)
        if not any(nn.parameter.is_lazy(p) for _, p in parameters):  # else they have shapes only after this call
            self._known_modules[module] = own_low_precision
        return own_low_precision

    def _holding_masters(self) -> list[MasterOptimizer]:
        """The script's optimizers that hold masters themselves."""
        return [optimizer for optimizer in list(self.stepped) if isinstance(optimizer, MasterOptimizer)]

    def _narrow_gradients(self, module: nn.Module) -> None:
        takes_them = _parameters(o for o in self._holding_masters() if o.release is None)
        narrow = [p for p in module.parameters() if id(p) in takes_them and id(p) not in self._narrowed]
        replicated = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in module.modules())
        if not narrow or replicated:
            self.notice(
                "fp32-gradients",
                "grads=bf16 has no effect on a replicated model, whose buckets are FP32"
                if replicated
                else "grads=bf16 has no effect: only the optimizers of halfstep.optim take 16-bit gradients",
            )
            return
        self._narrow.append(NarrowGradients(narrow))
        self._narrowed.update(map(id, narrow))

    def _give_masters(self) -> None:
        """Masters for 16-bit parameters that the script made itself, and steps with an optimizer that has none."""
        for optimizer in list(self.stepped):
            if not isinstance(optimizer, MasterOptimizer) and any(
                p.dtype in LOW_PRECISION for group in optimizer.param_groups for p in group["params"]
            ):
                self._masters.setdefault(optimizer, MasterWeights(optimizer))

    def replicating(self, original: Original, replica: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``DistributedDataParallel(module)``, which holds on to what parameters are: they are stored before."""
        self.store(module)
        return original(replica, module, *args, **kwargs)

    def making_program(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        """``torch.jit.trace(model)`` and its kin: the program shares plain FP32 weights with the model."""
        for model in (*args[:1], *kwargs.values()):
            for parameter in model.parameters() if isinstance(model, nn.Module) else ():
                make_plain(parameter, "a program is made of its model")
        return original(*args, **kwargs)

    def _prepare(self, module: nn.Module) -> None:
        self._islands.apply(module, self.policy.keep_fp32, self.device_type)
        stepped = _parameters(self.stepped)
        if any(id(parameter) in stepped for parameter in module.parameters()):  # no teacher, no averaged copy
            self.store(module)

    def store(self, module: nn.Module) -> None:
        """Put the module's parameters into planes, where the policy says so."""
        left = store_in_planes(module, self.policy)
        if self.policy.grads == "bf16":
            self._narrow_gradients(module)
        if left:
            name, why = next(iter(left.items()))
            casts = sum(2 * module.get_parameter(each).numel() for each in left)
            self.notice(
                "plain-storage",
                f"{len(left)} weights of {type(module).__name__} stay plain FP32 tensors, and are cast as under "
                f"{self.policy.compute}-mixed, with {casts / 2**20:.1f} MiB of copies from forward to backward "
                f"(first: {name}, because {why})",
                name,
            )

    def _stepped_by_policy(
        self, original: Original, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, bool, Tensor | None]:
        """Step as the policy wants; returns the step's result, whether it was applied, and the scale."""
        masters = self._masters.get(optimizer)
        if masters is not None:
            return masters.step(*args, call=lambda *a: original(optimizer, *a), **kwargs), True, None
        if not self.scales_loss:
            return original(optimizer, *args, **kwargs), True, None
        scaling = self._scaling
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            scale = scaling.scale
            applied = not scaling.overflowed(optimizer)
            result = original(optimizer, *args, **kwargs) if applied else None
        else:
            result, applied = self._stepped_with_closure(original, optimizer, closure)
            scale = scaling.scale
        claimed = self._buffers.claim(optimizer)
        if not applied:
            self._buffers.put_back(claimed)
            self._buffers.forget(claimed)
        else:
            self._buffers.settle(claimed)
        return result, applied, scale

    def _stepped_with_closure(
        self, original: Original, optimizer: Optimizer, closure: Callable[[], Any]
    ) -> tuple[Any, bool]:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                f"an overflow inside LBFGS's line search cannot be undone under {self.policy}; use bf16-mixed"
            )
        # A step may move parameters before it evaluates the closure again (sharpness-aware minimisation does).
        before = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        evaluated: list[Any] = [None]
        try:
            return original(optimizer, self._scaling.guarded(optimizer, closure, evaluated)), True
        except OverflowInClosure:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            return evaluated[0], False

    def is_ours(self, scaler: torch.amp.GradScaler) -> bool:
        """Whether a scaler is halfstep's own and not the script's."""
        return self._scaling.uses(scaler)

    def ended(
        self, optimizer: Optimizer, grad_norm: OnDevice, scale: OnDevice, overflowed: bool | Sequence[Tensor]
    ) -> None:
        """A step was made or skipped; see `halfstep.launch.steps.StepObserver.ended`."""
        counts = self.stepped.setdefault(optimizer, [0, 0])
        counts[0] += 1
        self._islands.require(self.policy.keep_fp32)
        with self.aside():
            place, masters = self.devices.current, self._masters.get(optimizer)
            counts[1] += self.steps.ended(optimizer, grad_norm, scale, overflowed, place, masters)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watcher is None else self.watcher.aside()

    def notice(self, code: str, message: str, where: str | None = None) -> None:
        if code not in self._noticed:
            self._noticed.add(code)
            self._write(Notice(code, message, where))


def _is_a_models_call(module: nn.Module) -> bool:
    """Whether this computes what a model says: not a weight that is read (a parametrization), nor a program of it."""
    if isinstance(module, ParametrizationList):
        return False
    return not (torch._C._get_tracing_state() or torch.onnx.is_in_onnx_export() or is_exporting())


def _parameters(optimizers: Iterable[Optimizer]) -> set[int]:
    """The identities of their parameters."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
