"""Whether an op's result would be in 16 bits under a policy, asked of a run that computes in FP32.

From one FP32 step the doctor predicts what a 16-bit format would do. Only tensors that would be *in* that format can
overflow or flush in it: under autocast the residual stream of a transformer, its norms on a GPU, and every loss stay
FP32. So the observer keeps one tag per tensor, "would be low", and asks here for each op's result::

    parameters, buffers, data            not low
    matrix products, convolutions, …     low, whatever their inputs are (autocast casts those)
    norms, softmax, losses, … (CUDA)     not low
    everything else                      PyTorch's promotion: low if all inputs with dimensions are
    in-place ops                         as the tensor they write into
    norms of mixed inputs, lookups       as their first input
    backward                             a gradient has the format of the tensor it belongs to (autograd sees to that):
                                         products low; an op that saved its forward input follows that; all others
                                         by promotion, so that the gradient of a low result is low
    optimizer, ``_foreach_*``            not low: parameters, their gradients and state are FP32 under a mixed policy

`halfstep.observe.low_tags.LowTags` keeps the tags of a run and asks.

Autocast's rules name the ops that a user calls (``linear``, ``softmax``, ``cross_entropy_loss``); a dispatch mode
stands below and sees what they are made of (``addmm``, ``_softmax``, ``_log_softmax``). `_MADE_OF` translates. Some
parts are those of several ops: on CPU ``_log_softmax`` is FP32 inside of ``cross_entropy`` and 16-bit on its own. The
function mode `Composites`, entered around the step, says which call an op is part of; without it the ambiguous ones
are judged as parts of the usual call, and parts without a rule of their own by promotion.

The tag is that of all floating results, but where `only_first`: statistics beside the first are FP32 in every kernel.

What cannot be seen from FP32 tensors: ``x.float()`` in a model is no op there, so what follows it is taken for 16-bit
if x would be.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from halfstep.autocast import rules
from halfstep.autocast.rules import Rule
from halfstep.observe.place import Phase
from halfstep.policy import Policy, overloads

#: What a dispatch mode sees -> the op that autocast has a rule for. The first with a rule on the device counts.
_MADE_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "convolution": ("conv2d",),
        "_convolution": ("conv2d",),
        "mkldnn_convolution": ("conv2d",),
        "cudnn_convolution": ("conv2d",),
        "cudnn_convolution_transpose": ("conv2d",),
        "mv": ("matmul",),
        "addmv": ("matmul",),
        "dot": ("matmul",),
        "_prelu_kernel": ("prelu",),
        "_cudnn_rnn": ("mkldnn_rnn_layer", "lstm_cell"),
        "mkldnn_rnn_layer": ("lstm_cell",),
        "_flash_attention_forward": ("scaled_dot_product_attention",),
        "_efficient_attention_forward": ("scaled_dot_product_attention",),
        "_softmax": ("softmax",),
        "_safe_softmax": ("softmax",),
        "_log_softmax": ("log_softmax", "cross_entropy_loss"),
        "native_group_norm": ("group_norm",),
        "native_layer_norm": ("layer_norm",),
        "_fused_rms_norm": ("rms_norm",),
        "nll_loss_forward": ("nll_loss",),
        "nll_loss2d_forward": ("nll_loss2d",),
        "multilabel_margin_loss_forward": ("multilabel_margin_loss",),
        "_cdist_forward": ("cdist",),
        "_euclidean_dist": ("cdist",),
        "_pdist_forward": ("pdist",),
        "_ctc_loss": ("ctc_loss",),
        "_fft_r2c": ("fft_rfft",),
        "_fft_c2c": ("fft_fft",),
        "_fft_c2r": ("fft_irfft",),
        "grid_sampler_2d": ("grid_sampler",),
        "grid_sampler_3d": ("grid_sampler",),
        "_trilinear": ("bilinear",),
        "linalg_cross": ("cross",),
    }
)
_FUSED_ATTENTION = "_scaled_dot_product_"

#: Backward kernels of ops that are low whatever goes in: the weight's 16-bit copy was saved.
_PRODUCTS_BACKWARD = (
    "convolution_backward",
    "mkldnn_rnn_layer_backward",
    "_cudnn_rnn_backward",
    "_prelu_kernel_backward",
)

#: Their result has the dtype of their first input, though others (weights, running statistics) are FP32.
_AS_FIRST = frozenset(
    [
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "batch_norm_elemt",
        "_fused_rms_norm",
        "masked_fill",
        "scatter",
        "index_add",
        "index_fill",
    ]
)

#: Losses and other calls of `torch.nn.functional` whose autocast rule goes by another name.
_CALLED = {"cross_entropy": "cross_entropy_loss", "softmin": "softmax"}
_UPCASTS = (torch.float32, torch.float64)


def would_be_low(
    func: Any,
    inputs_low: Sequence[bool],
    policy: Policy,
    *,
    phase: Phase = "forward",
    dims: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device_type: str = "cpu",
    forward_low: bool | None = None,
) -> bool:
    """Whether the op's result would be in the policy's 16-bit format.

    Args:
        func: the overload that a dispatch mode is handed: ``torch.ops.aten.mm.default``.
        inputs_low: for each floating tensor among its arguments, in their order and those in lists one by one, whether
            it would be.
        phase: where it runs. Autocast is off in the backward pass; what checkpointing recomputes there is forward.
        dims: the inputs' numbers of dimensions: tensors without any do not take part in promotion. Not given: all do.
        dtype: the ``dtype`` argument that the op was called with, if any; it decides.
        device_type: whose own rules hold where the policy has ``rules="torch"``.
        forward_low: of a backward op, whether what its forward op made would be low, or all that went into it; None:
            not known, and the op's own inputs have to tell.
    """
    name = _packet(func)
    if not policy.lowers or phase == "optimizer" or name.startswith(("_foreach", "_fused_adam")):
        return False
    if phase == "backward":
        return _gradient_low(func, name, inputs_low, dims, forward_low)
    if func.is_view:
        return _first(inputs_low)
    composite = _within.name
    if composite is not None:
        return _part_low(func, name, composite, inputs_low, dims, policy, device_type)
    if _writes_first(func):
        return bool(inputs_low) and inputs_low[0]
    if dtype is not None and dtype.is_floating_point:
        return dtype is policy.compute_dtype
    return _follow(rule_of(func, policy, device_type), name, inputs_low, dims)


def only_first(func: Any) -> bool:
    """Whether an op's other floating results are statistics (``rstd``, ``logsumexp``), FP32 whatever the first is."""
    name = _packet(func)
    return name.startswith(_FUSED_ATTENTION) or (name in _AS_FIRST and "norm" in name)


def casts_down(func: Any, policy: Policy, device_type: str = "cpu") -> bool:
    """Whether autocast would cast all that this forward op reads to 16 bits: what is too large becomes inf there."""
    return rule_of(func, policy, device_type) == "lower"


def rule_of(func: Any, policy: Policy, device_type: str = "cpu") -> Rule:
    """The autocast rule that an op at dispatch level runs under: its own, or that of the op it is a part of."""
    packet = _packet(func)
    table = _table(policy, device_type)
    own = table.get(f"{packet}.{func._schema.overload_name}") or table.get(packet)
    if own is not None:
        return own
    parts_of = (_ATTENTION,) if packet.startswith(_FUSED_ATTENTION) else _MADE_OF.get(packet, ())
    found = (_call_rule(call, policy, device_type) for call in parts_of)
    return next((rule for rule in found if rule != "none"), "none")


class Composites(TorchFunctionMode):
    """While entered, `would_be_low` knows which call of PyTorch's API an op is part of, where the rule is the call's.

    Costs a Python call for each call of PyTorch. It sees calls made from Python; one made inside of a function of
    `torch.nn.functional` is seen only as that function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        before = _within.name
        if before is None:
            _within.name = _composite(_CALLED.get(name, name), kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            _within.name = before


# ------------------------------------------------------------------ the parts of a call


class _Within(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # of the call of PyTorch's API that runs in this thread, if rules go by it


_within = _Within()
_EXPLICIT = "float32 asked for"
_ATTENTION = "scaled_dot_product_attention"
_HEADS = "multi_head_attention_forward"


def _composite(name: str, kwargs: Mapping[str, Any]) -> str | None:
    if kwargs.get("dtype") in _UPCASTS:
        return _EXPLICIT
    if name == _HEADS or name in _names_with_rules():
        return name
    return None


@functools.cache
def _names_with_rules() -> frozenset[str]:
    """Calls whose parts have no fixed rule; ops that are seen themselves need no help."""
    listed = rules.cuda_rules().keys() | rules.registered("cpu") | set(rules.CUDNN_STAND_INS)
    return frozenset(op.partition(".")[0] for op in listed if _is_composite(op))


def _is_composite(op: str) -> bool:
    names = [op] if torch._C._dispatch_has_kernel(f"aten::{op}") else []
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{n}", "CompositeImplicitAutograd") for n in names)


def _part_low(
    func: Any,
    name: str,
    composite: str,
    inputs_low: Sequence[bool],
    dims: Sequence[int] | None,
    policy: Policy,
    device_type: str,
) -> bool:
    """An op inside of a call with a rule: the call's inputs were cast, and autocast is off inside."""
    if composite == _EXPLICIT:
        return False
    rule = _call_rule(composite, policy, device_type)
    if composite == _HEADS:
        # Its in-projection, where not contiguous, is a product and an addition of the bias, both on 16-bit copies.
        if name == "add":
            return any(inputs_low)
        rule = rule_of(func, policy, device_type)
    elif composite == _ATTENTION:
        # Not fused, it computes in FP32 and rounds its result, the second product; the first is counted with it.
        return rule == "lower" and (name.startswith(_FUSED_ATTENTION) or name in ("bmm", "mm"))
    elif composite == "rms_norm" and rule == "none":
        return False if name != "_fused_rms_norm" else _first(inputs_low)
    elif rule in ("fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "banned"):
        return False
    elif rule == "lower":
        return True
    elif rule == "promote":
        return promoted(inputs_low, dims)
    else:
        rule = rule_of(func, policy, device_type)
        if name == "_log_softmax":  # cross_entropy asks it for its input's dtype, which CUDA's rule respects
            rule = "none"
    if _writes_first(func):
        return _first(inputs_low)
    return _follow(rule, name, inputs_low, dims)


def _call_rule(name: str, policy: Policy, device_type: str) -> Rule:
    table = _table(policy, device_type)
    own = [rule for op, rule in table.items() if op.partition(".")[0] == name]
    return own[0] if own else "none"


# ------------------------------------------------------------------ rules


def _follow(rule: Rule, name: str, inputs_low: Sequence[bool], dims: Sequence[int] | None) -> bool:
    if rule == "lower":
        return True
    if rule in ("fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "banned"):
        return False
    return _first(inputs_low) if name in _AS_FIRST else promoted(inputs_low, dims)


def _gradient_low(
    func: Any, name: str, inputs_low: Sequence[bool], dims: Sequence[int] | None, forward_low: bool | None
) -> bool:
    if name in rules.HEAVY or name in _PRODUCTS_BACKWARD or name.startswith(_FUSED_ATTENTION):
        return True
    if _writes_first(func):
        return _first(inputs_low)
    if forward_low is not None and not func.is_view:
        return forward_low
    saved = _saved_input(func)
    if saved is not None and saved < len(inputs_low):
        return inputs_low[saved]
    return promoted(inputs_low, dims)


@functools.cache
def _saved_input(func: Any) -> int | None:
    """Where in a backward op's tensors its forward input stands; None: it did not save it."""
    if not _packet(func).endswith("backward"):
        return None
    tensors = [a.name for a in func._schema.arguments if "Tensor" in str(a.type)]
    return next((tensors.index(name) for name in ("self", "input", "input_") if name in tensors[1:]), None)


def promoted(inputs_low: Sequence[bool], dims: Sequence[int] | None) -> bool:
    """Whether PyTorch's type promotion gives 16 bits."""
    if dims is not None:
        inputs_low = [low for low, dim in zip(inputs_low, dims, strict=True) if dim] or inputs_low
    return bool(inputs_low) and all(inputs_low)


def _first(inputs_low: Sequence[bool]) -> bool:
    return bool(inputs_low) and inputs_low[0]


@functools.cache
def _writes_first(func: Any) -> bool:
    arguments = func._schema.arguments
    first = arguments[0].alias_info if arguments else None
    return first is not None and bool(first.is_write)


@functools.cache
def _packet(func: Any) -> str:
    name: str = func._schema.name
    return name.partition("::")[2]


@functools.lru_cache(maxsize=16)
def _table(policy: Policy, device_type: str) -> Mapping[str, Rule]:
    """Every op with a rule: with its overload as autocast registers it."""
    table: dict[str, Rule] = {}
    if policy.rules == "cuda" or device_type == "cuda":
        table |= rules.cuda_rules()
        table |= dict.fromkeys(rules.CUDNN_ONLY, "lower")
        table |= dict.fromkeys(rules.CUDNN_STAND_INS, "lower")
        if device_type == "cpu" and not policy.emulate and rules.without_kernel(policy.compute_dtype):
            table.pop("lstm.data")  # a whole layer is FP32 there, and a call is known by its name alone
    elif device_type in rules.AUTOCAST_KEYS:
        own = rules.registered(device_type)
        table |= {op: "lower" if op in rules.CPU_LOWER else "fp32" for op in own}
        table |= {op: "promote" for op in own if op.partition(".")[0] in ("cat", "stack", "index_copy")}
    if device_type == "cpu" and not policy.emulate:
        table |= dict.fromkeys(rules.without_kernel(policy.compute_dtype), "fp32")
    for names, rule in ((policy.fp32_ops, "fp32"), (policy.low_ops, "lower")):
        for op in names:
            table |= dict.fromkeys((full.removeprefix("aten::") for full in overloads(op)), rule)  # type: ignore[arg-type]  # a literal of Rule
    return MappingProxyType(table)
