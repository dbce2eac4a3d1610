"""What ``benchmarks/optimizers.py`` measures: one `Row` for each optimizer, nearly all doing AdamW with one setting.

A row is told in which format its parameters are and how to start: given parameters that hold gradients, `Row.start`
returns the function that takes one step. It raises where the optimizer is not installed or refuses the machine; the
benchmark keeps that message word for word.

Rows of one family stand together: ``ceiling`` (what memory allows: nothing that reads and writes as much can be
faster), ``torch`` (PyTorch's own), ``halfstep``, and ``peer`` (other packages). Peers are wanted, not needed; without
their dependencies, so that none of them replaces the PyTorch that is measured::

    pip install --no-deps torch-optimi==0.3.3 torchao==0.18.0 bitsandbytes==0.50.2 flashoptim==0.1.4 triton==3.9.0
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Parameters = list[nn.Parameter]
Step = Callable[[], object]
Start = Callable[[Parameters], Step]

BASELINE = "torch fused fp32"
SGD_BASELINE = "torch fused SGD fp32"
TORCH_WHOLE = "torch fused fp32: unscale + clip + step"
TORCH_WHOLE_FOREACH = "torch fused fp32: unscale + foreach clip + step"
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SGD_SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
LION_SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0}
MAX_NORM = 1.0  # far below the gradients' norm: clipping always has to multiply
PEERS = ("torch-optimi", "torchao", "bitsandbytes", "flashoptim")

#: A GPT of 46.7 million parameters in 148 tensors of 9 shapes; and one that only shows that a row runs.
SIZES = {
    "full": {"width": 512, "layers": 12, "vocabulary": 16384, "positions": 1024},
    "smoke": {"width": 32, "layers": 1, "vocabulary": 64, "positions": 16},
}


def shapes(width: int, layers: int, vocabulary: int, positions: int) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2 of this size, with tied embeddings."""
    w = width
    block: list[tuple[int, ...]] = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,)]
    block += [(4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(vocabulary, w), (positions, w), *(layers * block), (w,), (w,)]


def parameters_of(size: str, dtype: torch.dtype, device: str) -> Parameters:
    torch.manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(shape)).to(device, dtype)) for shape in shapes(**SIZES[size])]


def refusal(error: Exception) -> str:
    """What an optimizer says that does not run here, word for word."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``against`` names the row that this one's time is divided by, ``goal`` is the ratio that halfstep must reach.
    ``moved`` is the traffic in bytes per parameter; where it is None, the benchmark derives it from the storages that
    it finds: weights and state read and written once, gradients read once. ``compiles`` marks rows that spend many
    seconds in a compiler before their first step. With ``releases`` steps happen inside backward: no step to time.
    """

    name: str
    family: str
    dtype: torch.dtype
    start: Start
    against: str = BASELINE
    goal: float | None = None
    moved: float | None = None
    compiles: bool = False
    releases: bool = False


def rows(device: str = "cpu") -> list[Row]:
    """All rows for parameters on this device, in the order of the table."""
    return [*_ceilings(), *_torch(), *_halfstep(), *_backends(device), *_peers()]


# --- what memory allows -----------------------------------------------------------------------------------------------


def _ceilings() -> list[Row]:
    def copy(parameters: Parameters) -> Step:
        source = _flat(parameters)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    def multiply(parameters: Parameters) -> Step:
        values = _flat(parameters)
        return lambda: values.mul_(0.9999)

    return [
        Row("copy_ fp32", "ceiling", torch.float32, copy, moved=8.0),
        Row("mul_ fp32 in place", "ceiling", torch.float32, multiply, moved=8.0),
    ]


def _flat(parameters: Parameters) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _torch() -> list[Row]:
    def adamw(**how: Any) -> Start:
        return lambda parameters: torch.optim.AdamW(parameters, **SETTINGS, **how).step

    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        Row(BASELINE, "torch", fp32, adamw(fused=True)),
        Row("torch foreach fp32", "torch", fp32, adamw(foreach=True)),
        Row("torch for-loop fp32", "torch", fp32, adamw(foreach=False)),
        Row("torch fused pure bf16", "torch", bf16, adamw(fused=True)),
        Row("torch fused, fp32 masters by hand", "torch", bf16, _masters_by_hand, moved=40.0),
        Row(TORCH_WHOLE, "torch", fp32, _torch_whole_step(foreach=None), moved=48.0),
        Row(TORCH_WHOLE_FOREACH, "torch", fp32, _torch_whole_step(foreach=True), moved=48.0),
        Row(SGD_BASELINE, "torch", fp32, lambda p: torch.optim.SGD(p, **SGD_SETTINGS, fused=True).step),
    ]


def _masters_by_hand(parameters: Parameters) -> Step:
    """The recipe of most training loops: gradients up to FP32, a fused step there, the weights down again."""
    masters: list[Tensor] = [nn.Parameter(p.detach().float()) for p in parameters]
    weights: list[Tensor] = [*parameters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, **SETTINGS, fused=True)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(gradients(masters), gradients(weights))
        optimizer.step()
        torch._foreach_copy_(weights, masters)

    return step


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _torch_whole_step(foreach: bool | None) -> Start:
    """What ``scaler.unscale_``, ``clip_grad_norm_`` and ``scaler.step`` run, without their bookkeeping."""

    def start(parameters: Parameters) -> Step:
        for p, gradient in zip(parameters, gradients(parameters), strict=False):
            p.grad = gradient.clone()  # unscaling and clipping write into gradients, which other rows read
        optimizer: Any = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
        found_inf = torch.zeros((), device=parameters[0].device)
        inverse_scale = torch.full((), 0.5, device=parameters[0].device)

        def step() -> None:
            # 2, 1/2, 2, ...: the factor is never 1, and gradients that are unscaled again and again do not vanish.
            torch.reciprocal(inverse_scale, out=inverse_scale)
            found_inf.zero_()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients(parameters), found_inf, inverse_scale)
            clip_grad_norm_(parameters, MAX_NORM, foreach=foreach)
            optimizer.grad_scale, optimizer.found_inf = None, found_inf  # as torch.amp.GradScaler hands them over
            optimizer.step()

        return step

    return start


# --- halfstep ---------------------------------------------------------------------------------------------------------

#: (master, state), for parameters in bf16. The last two have no master: weights rounded stochastically.
PAIRS = [
    ("exact", "fp32"),
    ("exact", "bf16"),
    ("exact", "8bit"),
    ("fp32", "fp32"),
    ("24bit", "fp32"),
    ("24bit", "8bit"),
    ("none", "bf16"),
    ("none", "8bit"),
]
GOALS = {("exact", "fp32"): 0.85, ("24bit", "8bit"): 1.0}


def _halfstep() -> list[Row]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    table = [
        Row(f"halfstep {m} + {s}", "halfstep", bf16, _adamw(master=m, state=s), goal=GOALS.get((m, s)))
        for m, s in PAIRS
    ]
    table += [
        Row(
            "halfstep none + bf16, kahan",
            "halfstep",
            bf16,
            _adamw(master="none", state="bf16", rounding="kahan"),
        ),
        Row("halfstep fp32 parameters", "halfstep", fp32, _adamw()),
        Row("halfstep exact + fp32, fp16 parameters", "halfstep", fp16, _adamw(master="exact")),
        Row(
            "halfstep exact + fp32: unscale + clip + step",
            "halfstep",
            bf16,
            lambda parameters: ours_whole_step(_optimizer(parameters, master="exact", state="fp32")),
            against=TORCH_WHOLE,
            goal=0.65,
            moved=28.0,
        ),
        Row("halfstep.MasterWeights, torch fused", "halfstep", bf16, _wrapper, moved=40.0),
    ]
    for state in ("fp32", "bf16"):
        sgd, lion = _ours("SGD", SGD_SETTINGS, state=state), _ours("Lion", LION_SETTINGS, state=state)
        table += [
            Row(f"halfstep SGD exact + {state}", "halfstep", bf16, sgd, against=SGD_BASELINE),
            Row(f"halfstep Lion exact + {state}", "halfstep", bf16, lion),
        ]
    for m, s in GOALS:
        start = _adamw(master=m, state=s, release_gradients=True)
        table.append(Row(f"halfstep {m} + {s}, gradients released", "halfstep", bf16, start, releases=True))
    return table


def _backends(device: str) -> list[Row]:
    """Each by name. The device's own is what the rows above run too: two rows of the same show the noise."""
    table = []
    for backend in ("native" if device == "cpu" else "triton", "compile", "eager"):
        for m, s in GOALS:
            start = _adamw(master=m, state=s, backend=backend)
            name = f"halfstep {m} + {s}, {backend}"
            table.append(Row(name, "halfstep", torch.bfloat16, start, compiles=backend == "compile"))
    if device != "cpu":
        name = "halfstep exact + fp32, a launch for each parameter"
        table.append(Row(name, "halfstep", torch.bfloat16, _a_group_for_each(master="exact", state="fp32")))
    return table


def _a_group_for_each(**how: Any) -> Start:
    """Groups are updated one by one: so many launches does it take where parameters are not gathered."""
    return lambda parameters: _optimizer([{"params": [p]} for p in parameters], **how).step


def _optimizer(parameters: Any, **how: Any) -> Any:
    return importlib.import_module("halfstep.optim").AdamW(parameters, **SETTINGS, **how)


def _adamw(**how: Any) -> Start:
    return lambda parameters: _optimizer(parameters, **how).step


def _ours(name: str, settings: dict[str, Any], **how: Any) -> Start:
    """Another optimizer than AdamW, exact masters."""

    def start(parameters: Parameters) -> Step:
        step: Step = getattr(importlib.import_module("halfstep.optim"), name)(parameters, **settings, **how).step
        return step

    return start


def ours_whole_step(optimizer: Any) -> Step:
    """Unscale, check, clip and step in two passes over memory: one over the gradients, one that updates."""
    inverse_scale = torch.full((), 0.5, device=optimizer.param_groups[0]["params"][0].device)

    def step() -> object:
        torch.reciprocal(inverse_scale, out=inverse_scale)  # as in PyTorch's row
        return optimizer.clipped_step(MAX_NORM, inverse_scale=inverse_scale)

    return step


def _wrapper(parameters: Parameters) -> Step:
    """Any torch optimizer with masters of ours."""
    optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
    masters = importlib.import_module("halfstep.optim").MasterWeights(optimizer)

    def step() -> None:
        with masters.exchanged():
            optimizer.step()
        masters.cast_back()

    return step


# --- others -----------------------------------------------------------------------------------------------------------


def _peers() -> list[Row]:
    def of(module: str, name: str, **how: Any) -> Start:
        def start(parameters: Parameters) -> Step:
            step: Step = getattr(importlib.import_module(module), name)(parameters, **SETTINGS, **how).step
            return step

        return start

    fp32, bf16 = torch.float32, torch.bfloat16
    ao, bnb, stochastic = "torchao.optim", "bitsandbytes.optim", {"bf16_stochastic_round": True}
    without = {"quantize": False, "master_weight_bits": None, "fused": False}
    return [
        Row("optimi AdamW, kahan", "peer", bf16, of("optimi", "AdamW", kahan_sum=True)),
        Row("optimi AdamW, kahan, foreach", "peer", bf16, of("optimi", "AdamW", kahan_sum=True, foreach=True)),
        Row("torchao _AdamW, stochastic", "peer", bf16, of(ao, "_AdamW", **stochastic), compiles=True),
        Row("torchao AdamW8bit, stochastic", "peer", bf16, of(ao, "AdamW8bit", **stochastic), compiles=True),
        Row("torchao AdamW4bit, stochastic", "peer", bf16, of(ao, "AdamW4bit", **stochastic), compiles=True),
        Row("bitsandbytes AdamW8bit", "peer", bf16, of(bnb, "AdamW8bit")),
        Row("bitsandbytes AdamW8bit fp32", "peer", fp32, of(bnb, "AdamW8bit")),
        Row("bitsandbytes AdamW fp32", "peer", fp32, of(bnb, "AdamW")),
        Row("flashoptim FlashAdamW", "peer", bf16, of("flashoptim", "FlashAdamW")),
        Row("flashoptim FlashAdamW, all switched off", "peer", bf16, of("flashoptim", "FlashAdamW", **without)),
    ]
