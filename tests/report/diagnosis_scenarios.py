"""Diagnoses as the doctor leaves them, for tests of what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from halfstep.doctor.diagnosis import DiagnosedStep, Diagnosis
from halfstep.doctor.finding import Finding, Severity, Trial
from halfstep.doctor.prediction import FormatPrediction, LayerUnderflow, Peak
from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.place import Place
from halfstep.observe.profile import OpRecord, Profile

ENVIRONMENT = {"torch": "2.13.0", "device": "CPU of a test", "cpu_flags": ["avx2", "amx_bf16"], "load": 0.3}
HOSTILE = "</script><script>alert(1)</script> $\\frac{1}{2}$ [red]<b>&\"' --> \udcff 模型"


def numbers(seed: int, center: float, spread: float = 3.0, count: int = 1000) -> ExponentHistogram:
    """Log-normal numbers around ``2**center``."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randn(count, generator=generator).sign()
    return ExponentHistogram.of(sign * torch.exp2(center + spread * torch.randn(count, generator=generator)))


def profile(modules: list[str]) -> Profile:
    """Activations grow and gradients shrink from module to module."""
    records = {}
    for depth, module in enumerate(modules):
        at = depth / max(len(modules) - 1, 1)
        for phase, center in (("forward", -1 + 9 * at**3), ("backward", -27 + 13 * at)):
            place = Place("mm", phase, module, "Linear", "train.py", 10 + depth)  # type: ignore[arg-type]
            histogram = numbers(2 * depth + (phase == "forward"), center)
            records[place, "torch.float32"] = OpRecord(place, "torch.float32", 1, 1000, 1.0, True, histogram)
    return Profile(records)


def steps(layers: list[str], count: int = 40, scaled: bool = True) -> tuple[DiagnosedStep, ...]:
    scale, made = 2.0**18, []
    for step in range(1, count + 1):
        skip = scaled and step in (1, 2, 3, 5, 23)
        shares = {
            layer: max(0.0, min(1.0, (1 - at / len(layers)) ** 3 * (0.2 + step / count) - 0.02))
            for at, layer in enumerate(layers)
        }
        made.append(DiagnosedStep(step, 4.0 - step / count, not skip, scale if scaled else None, shares))
        scale = scale / 2 if skip else scale
    return tuple(made)


MODULES = [
    "embed",
    *(f"blocks.{i}.{part}" for i in range(4) for part in ("norm", "attn.qkv", "attn.out", "mlp.wi", "mlp.wo")),
    "head",
]
LAYERS = ["embed", *(f"blocks.{i}" for i in range(4)), "head"]
OVERFLOW = Finding(
    code="HS101",
    place=Place("mm", "forward", "blocks.3.mlp.wo", "Linear", "train.py", 41),
    what="116,213 in magnitude is beyond fp16's largest number, 65,504; 312 of 131,072 elements became inf",
    consequence="The loss turns into NaN in this step, and every further step is skipped.",
    remedy="Keep blocks.3.mlp.wo in FP32, or use bf16, whose range is FP32's.",
    severity=Severity.ERROR,
    numbers={"amax": 116213.0, "limit": 65504.0, "elements": 131072, "share": 0.00238},
    count=12,
    step=1,
    trials=(
        Trial(
            "The same step with all activations divided by 4 before the product.",
            "tried, did not help",
            "Still 29,053 × 4 at blocks.3.mlp.wo; the residual sum overflows instead.",
            diff="--- a/train.py\n+++ b/train.py\n@@ -41 +41 @@\n-        return self.wo(F.gelu(self.wi(x)))\n"
            "+        return 4 * self.wo(F.gelu(self.wi(x)) / 4)\n",
        ),
        Trial(
            "blocks.3.mlp.wo in FP32.",
            "verified",
            "3 steps: no finding; loss 3.912 against FP32's 3.911.",
            policy="fp16-mixed:keep_fp32=blocks.3.mlp.wo",
        ),
    ),
)
FLUSHED = Finding(
    code="HS201",
    place=Place("mm", "backward", "blocks.0.attn.qkv", "Linear", "train.py", 27, "blocks.0.attn.qkv.weight"),
    what="71 % of the elements of this gradient are zero in fp16 and not in FP32",
    consequence="These weights stop learning, without any sign in the loss of a single step.",
    remedy="Scale the loss by 2^15 or let a dynamic loss scale find it.",
    severity=Severity.WARNING,
    numbers={"share": 0.71, "format": "fp16"},
    step=4,
)
SETTLING = Finding(
    code="HS206",
    place=None,
    what="4 of the first 5 steps were skipped while the loss scale fell from 2^18 to 2^14",
    consequence="None: the scale settles within the first steps.",
    remedy="Start at a scale of 2^14 to skip none.",
    severity=Severity.NOTE,
)


def peak(module: str, amax: float, largest: float) -> Peak:
    return Peak(Place("mm", "forward", module, "Linear", "train.py", 41), amax, amax / largest)


PREDICTIONS = (
    FormatPrediction(
        "fp16",
        61,
        overflows=(peak("blocks.3.mlp.wo", 116213.0, 65504.0), peak("head", 70001.0, 65504.0)),
        layers=(LayerUnderflow("blocks.0", 4000, 0.81, 0.002), LayerUnderflow("head", 90, 1.0, 0.0)),
        flushed=0.43,
        flushed_scaled=0.0004,
        loss_scale=2.0**15,
        window=(2.0**12, 2.0**19),
        keep_fp32=("blocks.3.mlp.wo", "head"),
        policy="fp16-mixed:keep_fp32=blocks.3.mlp.wo+head",
        reason="with blocks.3.mlp.wo, head in FP32 no result is beyond fp16's 65504",
    ),
    FormatPrediction("bf16", 61, policy="bf16-mixed", reason="no result is beyond bf16's 3.38953e+38"),
    FormatPrediction(
        "float8_e4m3fn",
        61,
        overflows=tuple(peak(f"blocks.{i}.mlp.wi", 900.0 + i, 448.0) for i in range(9)),
        layers=(LayerUnderflow("embed", 4000, 1.0, 0.5),),
        flushed=0.99,
        flushed_scaled=0.4,
        loss_scale=2.0**9,
        window=(2.0**14, 2.0**9),
        usable=False,
        reason="numbers are beyond float8_e4m3fn's 448 in 4 of 4 layers, from blocks.0 on: most of the model would "
        "have to be FP32; bf16 has the range",
    ),
    FormatPrediction("float8_e5m2", 0, reason="no op of this step would compute in it"),
)


@cache
def full() -> Diagnosis:
    """One of everything."""
    return Diagnosis(
        command=("train.py", "--layers", "4"),
        policy_requested="fp16-mixed",
        policy="fp16-mixed",
        reason="as asked",
        started="2026-01-01T08:30:00+00:00",
        environment=ENVIRONMENT,
        findings=(SETTLING, FLUSHED, OVERFLOW),
        predictions=PREDICTIONS,
        profile=profile(MODULES),
        steps=steps(LAYERS),
        notes=("The model is compiled; its eager numerics were examined, the compiled ones may differ.",),
    )


def empty() -> Diagnosis:
    return Diagnosis((), "auto", "bf16-mixed", "this CPU has bf16 products", "", {})


def clean() -> Diagnosis:
    found = replace(full(), policy="bf16-mixed", policy_requested="auto", findings=(), notes=())
    return replace(found, steps=steps(LAYERS, 10, scaled=False))


def only_notes() -> Diagnosis:
    return replace(full(), findings=(SETTLING,), predictions=())


def only_lint() -> Diagnosis:
    """Nothing was run."""
    return replace(full(), profile=None, predictions=(), steps=())


def one_step() -> Diagnosis:
    return replace(full(), steps=steps(LAYERS, 1))


@cache
def bad_numbers() -> Diagnosis:
    """Scales, losses, shares and histograms that are zero, infinite, NaN or empty."""
    odd = (
        DiagnosedStep(1, math.nan, False, math.inf, {"a": math.nan, "b": 0.0}),
        DiagnosedStep(2, math.inf, False, 0.0, {}),
        DiagnosedStep(9, None, False, 5e-324, {"a": 1.0}),
    )
    seen = profile(["a", "b"])
    place = Place("div", "forward", "c")
    values = torch.tensor([math.inf, math.nan, 0.0, 1e-45, 3e38])
    record = OpRecord(place, "torch.float32", 1, 5, math.nan, True, ExponentHistogram.of(values))
    empty = replace(record, place=replace(place, module="d"), histogram=ExponentHistogram())
    seen = Profile({**seen.records, (place, "x"): record, (empty.place, "x"): empty})
    numbers = {"nan": math.nan, "inf": -math.inf, "tiny": 5e-324, "huge": 10**400, "text": "a b"}
    return replace(full(), findings=(replace(OVERFLOW, numbers=numbers),), profile=seen, steps=odd)


@cache
def deep(layers: int = 96, count: int = 300) -> Diagnosis:
    """96 layers of ten modules, 300 steps, the same finding in each layer."""
    parts = ("norm1", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "mlp", "mlp.wi", "mlp.wo")
    modules = ["model.embed", *(f"model.layers.{i}.{part}" for i in range(layers) for part in parts), "lm_head"]
    rows = [f"model.layers.{i}" for i in range(layers)]
    found = [replace(FLUSHED, place=Place("mm", "backward", f"{row}.mlp.wi", "Linear", "m.py", 8)) for row in rows]
    return replace(full(), findings=(OVERFLOW, *found), profile=profile(modules), steps=steps(rows, count))


@cache
def hostile() -> Diagnosis:
    """Words that would break a page, an SVG, matplotlib's mathematics, rich's markup or a terminal."""
    words = HOSTILE
    place = Place(words, "backward", words, words, words + "\x1b[31m\x9b31m.py", 3, words)
    trials = tuple(Trial(words, outcome, words, words, words) for outcome in ("verified", "tried, did not help"))
    bad = Finding("HS101", place, words, words, words, Severity.ERROR, {words: words}, 2, 1, trials)
    return Diagnosis(
        command=("<i>&.py", words),
        policy_requested=words,
        policy=words,
        reason=words,
        started="2026-01-01T08:30:00+00:00",
        environment={words: words},
        findings=(bad, *(replace(bad, trials=()) for _ in range(9))),
        predictions=tuple(replace(p, reason=words, keep_fp32=(words,) * 9) for p in PREDICTIONS),
        profile=profile([words, f"{words}.{words}", words + "2"]),
        steps=steps([words, words + "2"], 3),
        notes=(words,),
    )


ALL: list[Callable[[], Diagnosis]] = [
    full,
    empty,
    clean,
    only_notes,
    only_lint,
    one_step,
    bad_numbers,
    deep,
    hostile,
]
