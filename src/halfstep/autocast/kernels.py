"""Rules put into PyTorch's dispatcher: one Python kernel per overridden op, on a device's autocast key.

The dispatcher's table is the process's, autocast itself is the thread's. So a kernel first asks which `Plan` is in
force *in this thread*; where there is none, it calls what was registered before, and PyTorch behaves as if we were not
here. An op's kernel is registered when the first region under a plan with a rule for it is entered (about 2 ms for
CUDA's whole list), and stays for the life of the process: `torch.library` does not give all memory back, and a loop
that registered and took back in each step would grow by it. One kernel serves all plans; it reads the thread's.

Casting happens above autograd, as in PyTorch, so that gradients flow back through the casts. A weight is cast once per
region and format, as by PyTorch's weight cache, and its gradients then accumulate in 16 bits as they do there.

This imitates the ``WrapFunction_`` templates in PyTorch's ``aten/src/ATen/autocast_mode.h``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfstep.autocast import emulate, float8
from halfstep.autocast.containers import map_tensors
from halfstep.autocast.rules import AUTOCAST_KEYS, HEAVY, NO_CPU_KERNEL, Plan, Rule, registered
from halfstep.split import SplitTensor

Kernel = Callable[..., Any]


class _CastWeight(NamedTuple):
    weight: weakref.ref[Tensor]
    version: int  # of the weight when it was cast; PyTorch's cache has none and goes on using stale casts
    cast: Tensor


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.plans: list[Plan | None] = []  # of the regions entered, the innermost last; None: PyTorch's own rules
        self.weights: dict[tuple[int, torch.dtype], _CastWeight] | None = None
        self.inside = False  # a composite op whose inputs are cast already: its parts are emulated, not cast


_thread = _ThreadState()
_lock = threading.RLock()
_libraries: dict[str, torch.library.Library] = {}  # by namespace: taken back when the process ends
_registered: set[tuple[str, str]] = set()  # ops, and the device types on whose keys their kernels are
_ready: weakref.WeakSet[Plan] = weakref.WeakSet()  # plans of which all are
_backward_plans: list[Plan | None] = []  # for backward threads of devices, which have no regions of their own


class MissingKernelWarning(UserWarning):
    """An op stays in FP32 because this CPU has no kernel for it in the policy's format. Given once for each."""


#: Who is told of that instead; `halfstep run` makes it a notice with the script's line.
listeners: list[Callable[[str], None]] = []


def active() -> bool:
    """Whether this thread is in a region that changes PyTorch's rules."""
    return bool(_thread.plans)


@contextlib.contextmanager
def in_force(plan: Plan | None, *, backward: bool = False) -> Iterator[None]:
    """Make ``plan`` what autocast does in this thread; None is PyTorch's own rules, also inside another plan.

    Args:
        backward: for the time of a backward pass: also for the threads that it runs in, and without a cache of weight
            casts, which would outlive the recomputation they were made in.
    """
    if plan is None and not _thread.plans:
        yield
        return
    outermost = not _thread.plans
    weights_before = _thread.weights
    if plan is not None and plan not in _ready:
        _register(plan)
    _thread.plans.append(plan)
    _thread.weights = None if backward else {} if outermost else weights_before
    if backward:
        _backward_plans.append(plan)
    try:
        yield
    finally:
        if backward:
            _backward_plans.remove(plan)
        _thread.weights = weights_before
        _thread.plans.pop()


def _register(plan: Plan) -> None:
    """Put the kernels of a plan's ops where they are not yet."""
    key = AUTOCAST_KEYS[plan.device_type]
    with _lock, warnings.catch_warnings():
        # "Overriding a previously registered kernel": that is what we are here for.
        warnings.filterwarnings("ignore", message="(?s).*verriding a previously registered kernel")
        new = {name: _kernel(name, plan.device_type) for name in plan.rules}  # all are made before any is registered
        for name, kernel in new.items():
            if (name, plan.device_type) in _registered:
                continue
            namespace, _, op = _qualified(name).partition("::")
            if namespace not in _libraries:
                _libraries[namespace] = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]  # torch's own class lacks annotations
            _libraries[namespace].impl(op, kernel, key, with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]  # as above
            _registered.add((name, plan.device_type))
        _ready.add(plan)


def _qualified(name: str) -> str:
    return name if "::" in name else f"aten::{name}"


def _current(device_type: str) -> Plan | None:
    plan = None
    if _thread.plans:
        plan = _thread.plans[-1]
    elif _backward_plans and torch._C._current_graph_task_id() != -1:
        plan = _backward_plans[-1]
    return plan if plan is not None and plan.device_type == device_type else None


@functools.cache
def _kernel(name: str, device_type: str) -> Kernel:
    """The kernel for an op; made once, before anything of ours is registered for it, so it knows what was there."""
    namespace, _, rest = _qualified(name).partition("::")
    packet, _, overload = rest.partition(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    key = getattr(torch._C.DispatchKey, AUTOCAST_KEYS[device_type])
    below = torch._C._dispatch_keyset_full_after(key)
    off = torch._C.DispatchKeySet(key)
    own_rule = name in registered(device_type) or torch._C._dispatch_has_kernel_for_dispatch_key(
        _qualified(name), AUTOCAST_KEYS[device_type]
    )
    before = torch.library.get_kernel(_qualified(name), AUTOCAST_KEYS[device_type]) if own_rule else None
    heavy, missing = name in HEAVY, name in NO_CPU_KERNEL and device_type == "cpu"

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        plan = _current(device_type)
        rule = None if plan is None else plan.rules.get(name)
        if plan is None or rule is None:
            if before is not None:
                return before.call_boxed(keyset, *args, **kwargs)
            return op.redispatch(keyset & below, *args, **kwargs)
        low = torch.get_autocast_dtype(device_type)
        target = op
        if name in plan.kept and rule == "fp32":
            _tell_of_kept(name, low)
        if _thread.inside:
            rule = "none"
        elif rule != "none":
            target, args, kwargs = _apply(rule, op, args, kwargs, low, device_type)
        emulated = missing or (plan.emulate and not plan.float8 and heavy)
        if (emulated or (plan.float8 and name in float8.PRODUCTS)) and emulate.takes(args, kwargs, low):
            with torch._C._ExcludeDispatchKeyGuard(off):
                if plan.float8 and not emulated:
                    return float8.product(name, args, kwargs, low)
                return emulate.rounded(target, args, kwargs, low)
        if plan.emulate and rule == "lower" and (not plan.float8 or name in float8.MADE_OF_PRODUCTS):
            # A composite op: skip autocast for itself only, so that its parts come by here and are emulated.
            with _inside():
                return op.redispatch(keyset & below, *args, **kwargs)
        if rule == "none":
            return op.redispatch(keyset & below, *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return target(*args, **kwargs)

    return kernel


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False


def _apply(
    rule: Rule, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], low: torch.dtype, device_type: str
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The op to call, and its arguments, under a rule."""
    if rule == "banned":
        raise RuntimeError(
            f"CUDA's autocast refuses {op.__name__.partition('.')[0]}: its input, a sigmoid's output, rounds to 0 or 1 "
            "in 16 bits and the logarithm is then infinite. Use binary_cross_entropy_with_logits (BCEWithLogitsLoss) "
            "on the logits, or compute this loss outside of autocast"
        )
    if rule in ("fp32_set_opt_dtype", "fp32_append_dtype"):
        if rule == "fp32_append_dtype":
            return _append_dtype(op, args, kwargs, device_type)
        if _eligible(args[0], device_type) and _argument(op, "dtype", args, kwargs) is None:
            kwargs = {**kwargs, "dtype": torch.float32}
            args = args[: _position(op, "dtype")]
        return op, args, kwargs
    to = {"lower": low, "fp32": torch.float32}.get(rule) or _widest((args, kwargs), low, device_type)

    def cast(tensor: Tensor) -> Tensor:
        return _cast(tensor, to) if _eligible(tensor, device_type) else tensor

    return op, map_tensors(args, cast), map_tensors(kwargs, cast)


def _append_dtype(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    aten = torch.ops.aten
    redirected = {
        aten.norm.Scalar: aten.norm.ScalarOpt_dtype,
        aten.norm.ScalarOpt_dim: aten.norm.ScalarOpt_dim_dtype,
    }[op]
    arguments = [_argument(op, argument.name, args, kwargs) for argument in op._schema.arguments]
    dtype = torch.float32 if _eligible(args[0], device_type) else args[0].dtype
    return redirected, tuple(arguments), {"dtype": dtype}


def _argument(op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position = _position(op, name)
    if name in kwargs:
        return kwargs[name]
    if position < len(args):
        return args[position]
    return op._schema.arguments[position].default_value


def _position(op: Any, name: str) -> int:
    return next(i for i, argument in enumerate(op._schema.arguments) if argument.name == name)


def _eligible(value: Any, device_type: str) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and value.device.type == device_type
    )


def _widest(arguments: Any, low: torch.dtype, device_type: str) -> torch.dtype:
    found = {low, *(leaf.dtype for leaf in tree_leaves(arguments) if _eligible(leaf, device_type))}
    other = found - {low, torch.float32}
    if other:
        raise RuntimeError(
            f"autocast to {low} promotes between it and torch.float32, and got {', '.join(map(str, other))}"
        )
    return torch.float32 if torch.float32 in found else low


def _cast(tensor: Tensor, to: torch.dtype) -> Tensor:
    if tensor.dtype is to:
        return tensor
    keep = (
        _thread.weights is not None
        and tensor.dtype is torch.float32
        and tensor.requires_grad
        and tensor.is_leaf
        and not tensor._is_view()
        and torch.is_grad_enabled()
        and torch.is_autocast_cache_enabled()
        and type(tensor) in (Tensor, torch.nn.Parameter)  # not the tensors of a tracer, which die with it
    )
    if isinstance(tensor, SplitTensor):  # the op, not the method: what asks is autocast, and may have the plane itself
        return torch.ops.aten._to_copy.default(tensor, dtype=to)  # type: ignore[no-any-return]
    if not keep:
        return tensor.to(to)
    assert _thread.weights is not None
    key = (id(tensor), to)
    known = _thread.weights.get(key)
    if known is not None and known.weight() is tensor and known.version == tensor._version:
        return known.cast
    cast = tensor.to(to)
    _thread.weights[key] = _CastWeight(weakref.ref(tensor), tensor._version, cast)
    return cast


#: Called by another name than their own.
_SPOKEN = {"mkldnn_rnn_layer": "LSTM layers"}


@functools.cache
def _warn_of_kept(message: str) -> None:
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("halfstep", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MissingKernelWarning, stacklevel=level)


def _tell_of_kept(name: str, low: torch.dtype) -> None:
    message = (
        f"{_SPOKEN.get(name, name)} stay in FP32: this CPU has no kernel for training them in "
        f"{str(low).removeprefix('torch.')} (oneDNN needs AVX512_BF16 or AMX_BF16 for bfloat16, AMX_FP16 for float16); "
        "`emulate` in the policy shows what the format would do to them"
    )
    for listener in listeners:
        listener(message)
    if not listeners:
        _warn_of_kept(message)
