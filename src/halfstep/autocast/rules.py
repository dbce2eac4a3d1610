"""Which op runs in which format: CUDA's autocast lists, and a policy's changes to a device's.

A rule says how an op's floating inputs are cast before it runs; ops without a rule follow PyTorch's type promotion.
`plan` gives, for a policy and a device, the ops whose rule differs from what PyTorch does there by itself: those, and
only those, are overridden (`halfstep.autocast.kernels`). A policy's own lists come first, then ``rules="cuda"``, then
the device.

Source of the lists: PyTorch's ``aten/src/ATen/autocast_mode.h`` (the ``AT_FORALL_…`` macros) and ``autocast_mode.cpp``
(``TORCH_LIBRARY_IMPL(aten, Autocast…)``). The dispatcher can be asked for the ops, not for their category, so the
categories of all supported versions' ops are kept here, and `cuda_rules` leaves out what this PyTorch's list lacks.
`unlisted` names the ops that a PyTorch newer than this table added; a test holds it empty.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch.autograd import backward as _backward  # PyTorch's own: under `halfstep run` the name becomes the launcher's

from halfstep.autocast.float8 import MADE_OF_PRODUCTS, PRODUCTS
from halfstep.policy import Policy, overloads

#: How an op's inputs are cast:
#: lower: to the region's 16-bit format · fp32: to FP32 · fp32_set_opt_dtype: the op's own ``dtype`` argument is set to
#: FP32 unless given · fp32_append_dtype: redirected to the overload that takes a dtype · promote: to the widest among
#: the inputs · banned: an error · none: no casts, PyTorch's type promotion.
Rule = Literal["lower", "fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "promote", "banned", "none"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CUDA: Mapping[Rule, tuple[str, ...]] = MappingProxyType(
    {
        "lower": _names("""
            _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
            conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm
            baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell
            rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
            cudnn_convolution cudnn_convolution_transpose
            """),
        "fp32": _names("""
            acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
            pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
            nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
            hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
            multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
            binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
            _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
            _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
            upsample_bicubic2d _upsample_bicubic2d_aa linalg_matrix_sqrth
            """),
        "fp32_set_opt_dtype": _names("""
            prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
            linalg_matrix_norm.str_ord sum sum.dim_IntList
            """),
        "fp32_append_dtype": ("norm.Scalar", "norm.ScalarOpt_dim"),
        "promote": _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"),
        "banned": ("binary_cross_entropy",),
    }
)

#: Ops that a CUDA build with cuDNN registers in addition. PyTorch's CPU has no such op: there these do its work, and
#: take its rule. (A whole layer of a GRU, and any on packed sequences, is made of products and elementwise ops there,
#: which by themselves would add the layer's FP32 state to 16-bit products, and end in FP32.)
CUDNN_ONLY = ("_cudnn_rnn",)
CUDNN_STAND_INS = _names("""
    mkldnn_rnn_layer gru.input gru.data lstm.data rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data
    """)

#: Overloads for named dimensions, which PyTorch had until 2.12: no rule here, so type promotion.
_NAMED_DIMENSIONS = _names("""
    prod.dim_Dimname softmax.Dimname log_softmax.Dimname cumprod.dimname cumsum.dimname norm.names_ScalarOpt_dim
    sum.dim_DimnameList
    """)

#: What the CPU's own lists lower: the ops that emulation has to take over there.
CPU_LOWER = _names("""
    conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding bmm mm linalg_vecdot baddbmm addmm
    _addmm_activation addbmm linear _convolution.deprecated matmul conv_tbc mkldnn_rnn_layer conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input prelu scaled_dot_product_attention _native_multi_head_attention
    """)

#: Ops whose 16-bit kernels are what a machine lacks: matrix products, convolutions, attention, recurrent layers.
#: Elementwise ops and reductions are not here: PyTorch's CPU kernels compute those in FP32 and round, as emulation
#: would.
HEAVY = frozenset(
    _names("""
    mm bmm addmm baddbmm addbmm mv addmv addr dot vdot _addmm_activation convolution _convolution
    _convolution.deprecated conv_tbc scaled_dot_product_attention _native_multi_head_attention mkldnn_rnn_layer
    """)
)

#: Ops that CUDA runs in 16 bits and for which PyTorch's CPU has no 16-bit kernel (its own rules hide that by casting to
#: FP32), or had none until 2.12 (trace): under CUDA's rules they are computed in FP32 and
#: rounded.
NO_CPU_KERNEL = frozenset({"avg_pool3d", "trace"})

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


@dataclass(frozen=True)
class Plan:
    """What a policy changes about a device's autocast.

    Compared by identity: `plan` returns the same object for the same policy and device.
    """

    device_type: str
    rules: Mapping[str, Rule]  #: op with overload -> rule, without the ``aten::``
    emulate: bool
    float8: bool  #: of what would be emulated, only products and what is made of them, in float8
    kept: frozenset[str]  #: ops that stay in FP32 because this CPU has no kernel for them in the policy's format

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class UnsupportedDeviceError(ValueError):
    """This device type has no autocast that halfstep knows how to change."""


@functools.lru_cache(maxsize=64)
def plan(policy: Policy, device_type: str) -> Plan | None:
    """The ops that ``policy`` treats otherwise than PyTorch's autocast of ``device_type``; None: it changes nothing.

    Raises:
        UnsupportedDeviceError: the policy changes rules and the device type is not one of `AUTOCAST_KEYS`.
    """
    changes = policy.fp32_ops or policy.low_ops or policy.rules == "cuda" or policy.emulate
    emulates_all = policy.emulate and not policy.float8
    kept = frozenset() if device_type != "cpu" or emulates_all else without_kernel(policy.compute_dtype)
    if not changes and not kept:
        return None
    if device_type not in AUTOCAST_KEYS:
        raise UnsupportedDeviceError(
            f"rules, op lists and emulation are known for {', '.join(AUTOCAST_KEYS)}, not for {device_type!r}"
        )
    rules: dict[str, Rule] = {}
    as_cuda = policy.rules == "cuda" or device_type == "cuda"
    if policy.rules == "cuda" and device_type != "cuda":
        rules |= dict.fromkeys(registered(device_type), "none")
        rules |= cuda_rules()
        if device_type == "cpu":  # whole LSTM layers not where their kernel is missing, and they stay in FP32
            rules |= dict.fromkeys(CUDNN_STAND_INS if kept else (*CUDNN_STAND_INS, "lstm.input"), "lower")
    if policy.emulate:
        lower = {op for op, rule in cuda_rules().items() if rule == "lower"} if as_cuda else set(CPU_LOWER)
        for op in PRODUCTS.keys() | (MADE_OF_PRODUCTS & lower) if policy.float8 else HEAVY | lower:
            rules.setdefault(op, "lower" if op in lower else "none")
    rules |= dict.fromkeys(kept, "fp32")
    for names, rule in ((policy.fp32_ops, "fp32"), (policy.low_ops, "lower")):
        for name in names:
            rules |= dict.fromkeys((full.removeprefix("aten::") for full in overloads(name)), rule)  # type: ignore[arg-type]  # a literal of Rule
    if not rules:
        return None
    return Plan(device_type, MappingProxyType(rules), policy.emulate, policy.float8, kept)


@functools.cache
def without_kernel(low: torch.dtype) -> frozenset[str]:
    """The ops that autocast lowers and this CPU cannot run in ``low``, backward included: asked by running them.

    oneDNN has LSTM layers in BF16 with AVX512_BF16 or AMX_BF16 only, and none for training in FP16 but with AMX_FP16;
    elsewhere PyTorch ends in "could not create a primitive descriptor".
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own function
        return frozenset()
    # In a thread of its own: modes that watch or fake, autocast, inference mode and hooks are those of the thread that
    # asks, and have nothing to do with this.
    with ThreadPoolExecutor(1) as thread:
        runs = thread.submit(_lstm_runs, low).result()
    return frozenset() if runs else frozenset({"mkldnn_rnn_layer"})


def _lstm_runs(low: torch.dtype) -> bool:
    size, lstm = 8, 2
    shapes = (1, 1, size), (4 * size, size), (4 * size, size), (4 * size,), (4 * size,), (1, 1, size), (1, 1, size)
    given = [torch.zeros(shape, dtype=low, device="cpu", requires_grad=True) for shape in shapes]
    options: tuple[object, ...] = (False, [], lstm, size, 1, True, False, False, True)
    try:
        out = torch.ops.aten.mkldnn_rnn_layer(*given, *options)[0]
        _backward(out, torch.ones_like(out))
    except RuntimeError as error:
        # Anything else than a missing kernel is for the script's own layer to say.
        return not any(words in str(error) for words in ("primitive", "not implemented", "not supported"))
    return True


@functools.cache
def cuda_rules() -> Mapping[str, Rule]:
    """The rule of each op on the CUDA list of this PyTorch."""
    listed = registered("cuda")
    return MappingProxyType({op: rule for rule, ops in _CUDA.items() for op in ops if op in listed})


def unlisted() -> frozenset[str]:
    """Ops on the CUDA list of this PyTorch whose rule is not known here; under ``rules="cuda"`` they have none."""
    return registered("cuda") - cuda_rules().keys() - {*CUDNN_ONLY, *_NAMED_DIMENSIONS}


@functools.cache
def registered(device_type: str) -> frozenset[str]:
    """The aten ops with a rule in this PyTorch's autocast of a device: asked once, before rules of ours are there."""
    key = AUTOCAST_KEYS[device_type]
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("aten::") for name in names if name.startswith("aten::"))
