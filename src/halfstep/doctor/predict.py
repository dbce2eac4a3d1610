"""What another format would do to this model, from one step in FP32.

The profile of an FP32 step has, for every op, the largest magnitude and the exponent histogram of its results, and
whether they would be 16-bit under autocast (`halfstep.observe.lowering`). From these follow, for every format::

    overflow     amax >= overflow threshold (fp16: 65520)
    underflow    share of non-zero gradients below half the smallest subnormal number (fp16: 2**-25), as a lower bound
    loss scale   2**(emax - 3 - e), e the largest gradient's exponent (fp16: 2**(12 - e)); leaves 3 octaves free
    window       [smallest scale that flushes less than `TOLERANCE`, largest without overflow]
    FP32 islands the modules of the ops that overflow forward, and of the products that read what is too large

An op that only moves or selects numbers (``cat``, ``masked_fill``) is not blamed: what it hands on was made elsewhere,
or is a constant (-inf and float32's smallest number in masks, which a model writes differently in another format).

The formats of 8 bits are judged like the others, without the per-tensor scales that float8 training uses: what is said
of them is why those scales are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from halfstep import formats
from halfstep.autocast import islands
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.prediction import FormatPrediction, LayerUnderflow, Peak
from halfstep.formats import Format
from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.place import Place
from halfstep.policy import POLICIES, Policy

if TYPE_CHECKING:
    from halfstep.observe.ops import OpRecord, Profile

__all__ = ["HEADROOM", "TOLERANCE", "FormatPrediction", "LayerUnderflow", "Peak", "findings_of", "predict"]

#: The share of gradient elements that may flush before a scale counts as too small.
TOLERANCE = 0.01
#: The share of a layer's gradients from which on it does not learn: as HS201 judges gradients that did flush.
SERIOUS = 0.25
#: Below this factor to the largest number, growth during training is likely to pass it.
HEADROOM = 2.0
#: Loss scales that are considered, as powers of two.
SCALES = range(-24, 65)

_POLICIES = {"fp16": "fp16-mixed", "bf16": "bf16-mixed"}
_MOVING = frozenset(
    [
        "masked_fill",
        "masked_fill_",
        "where",
        "fill",
        "fill_",
        "full",
        "full_like",
        "clone",
        "copy_",
        "cat",
        "stack",
        "index",
        "index_put",
        "index_put_",
        "gather",
        "slice_backward",
        "select_backward",
        "index_select",
        "repeat",
        "_unsafe_view",
        "zero_",
        "detach",
        "constant_pad_nd",
        "embedding",
        "roll",
        "flip",
        "_to_copy",
        "zeros_like",
        "ones_like",
        "new_full",
        "masked_scatter",
        "scatter",
        "maximum",
        "minimum",
        "clamp",
        "clamp_min",
        "clamp_max",
    ]
)
#: Results of these are FP32 as soon as one input is: behind an FP32 island they stop overflowing by themselves.
_PROMOTING = frozenset(["add", "sub", "mul", "div", "rsub", "addcmul", "addcdiv"])
#: From here on a float32 is not a result but a mask's constant: ``finfo(float32).min`` and its half.
_MASK_EXPONENT = 126


def predict(
    profile: Profile, formats: Sequence[str] = ("fp16", "bf16", "float8_e4m3fn", "float8_e5m2")
) -> tuple[FormatPrediction, ...]:
    """One prediction per format, from the profile of one or several FP32 steps.

    Raises:
        ValueError: an unknown format.
    """
    records = _lowered(profile)
    return tuple(_predict(records, name) for name in formats)


def findings_of(predictions: Iterable[FormatPrediction], policy: Policy) -> list[Finding]:
    """What the prediction for a policy's 16-bit format means for a run under it."""
    wanted = {p.format: p for p in predictions}.get(formats.of(policy.compute_dtype).name) if policy.lowers else None
    if wanted is None or not wanted.ops:
        return []
    scaled = policy.loss_scaling and policy.compute == "fp16"
    found = _range_findings(wanted, policy)
    # Where the format is not usable, its loss scale is of no interest.
    return found if any(f.code == "HS108" for f in found) else [*found, *_scale_findings(wanted, scaled)]


# ------------------------------------------------------------------ one format


def _predict(records: Sequence[OpRecord], name: str) -> FormatPrediction:
    format = formats.of(name)
    if not records:
        return FormatPrediction(name, 0, policy=_POLICIES.get(name), reason="no op of this step would compute in it")
    peaks = [
        Peak(record.place, amax, amax / format.max)
        for record in records
        if record.place.op not in _MOVING and (amax := _amax(record)) is not None
    ]
    overflows = tuple(peak for peak in peaks if peak.amax >= format.overflow_threshold)
    made = {peak.amax for peak in overflows}
    casts = [peak for peak in _operands(records, format) if peak.amax >= format.overflow_threshold]
    overflows += tuple(peak for peak in casts if peak.amax not in made)
    forward = [peak.place for peak in overflows if peak.place.phase == "forward"]
    # An island's result is as large as before; whoever casts it down again has to be an island too.
    keep = _islands([*forward, *(peak.place for peak in casts if peak.amax in made)])
    usable, reason = _usable(records, forward, keep, format)
    prediction = FormatPrediction(
        name,
        ops=len(records),
        overflows=overflows,
        little_headroom=tuple(p for p in peaks if p.amax < format.overflow_threshold and p.ratio * HEADROOM > 1),
        keep_fp32=keep,
        policy=_policy(name, keep) if usable else None,
        usable=usable,
        reason=reason,
    )
    return _with_gradients(prediction, [record for record in records if record.place.phase == "backward"], format)


def _with_gradients(prediction: FormatPrediction, records: Sequence[OpRecord], format: Format) -> FormatPrediction:
    by_layer: dict[str, list[ExponentHistogram]] = {}
    for record in records:
        by_layer.setdefault(record.place.module, []).append(record.histogram)
    merged = {layer: ExponentHistogram.merge(parts) for layer, parts in by_layer.items()}
    everything = ExponentHistogram.merge(merged.values())
    amax = max((amax for record in records if (amax := _amax(record))), default=0.0)
    scale, window = _scale(everything, amax, format)
    power = round(math.log2(scale))
    layers = tuple(
        LayerUnderflow(layer, part.nonzero, part.flushed_share(format), _flushed(part, power, format))
        for layer, part in merged.items()
    )
    return replace(
        prediction,
        layers=layers,
        flushed=everything.flushed_share(format),
        flushed_scaled=_flushed(everything, power, format),
        loss_scale=scale,
        window=window,
    )


def _scale(gradients: ExponentHistogram, amax: float, format: Format) -> tuple[float, tuple[float, float] | None]:
    """The static loss scale, and the window in which any is safe."""
    if format.exponent_bits >= formats.FORMATS["fp32"].exponent_bits or not amax:
        return 1.0, None
    fitting = [k for k in SCALES if _flushed(gradients, k, format) < TOLERANCE]
    in_range = [k for k in SCALES if math.ldexp(amax, k) < format.overflow_threshold]
    low = math.ldexp(1.0, fitting[0]) if fitting else math.inf
    high = math.ldexp(1.0, in_range[-1]) if in_range else 0.0
    scale = math.ldexp(1.0, min(max(format.emax - 3 - math.frexp(amax)[1] + 1, SCALES[0]), SCALES[-1]))
    if low <= high:
        scale = min(max(scale, low), high)
    return scale, (low, high)


def _flushed(gradients: ExponentHistogram, power: int, format: Format) -> float:
    """Share of the non-zero gradients that flush at scale 2**power: at least.

    Asked by moving the limit, not the numbers: those that a scale takes beyond FP32 would drop out of the share.
    """
    return gradients.share_below(format.emin - format.mantissa_bits - 1 - power)


def _amax(record: OpRecord) -> float | None:
    """The largest number that an op computed; None: it made only zeros, inf, NaN and constants of masks."""
    if math.isfinite(record.amax) and math.frexp(record.amax)[1] - 1 < _MASK_EXPONENT:
        return record.amax or None
    histogram = record.histogram
    exponents = [e for e in range(-126, _MASK_EXPONENT) if int(histogram.counts[e + 127])]
    return math.ldexp(1.0, exponents[-1]) if exponents else None


def _operands(records: Sequence[OpRecord], format: Format) -> list[Peak]:
    """The largest numbers that forward products read, and would cast to the format; of a profile that recorded them."""
    found = []
    for record in records:
        amax: float | None = getattr(record, "operand_amax", None)
        if amax is not None and math.isfinite(amax) and record.place.phase == "forward":
            found.append(Peak(record.place, amax, amax / format.max))
    return found


def _lowered(profile: Profile) -> list[OpRecord]:
    records = profile.records
    every = records.values() if isinstance(records, Mapping) else records
    return [record for record in every if record.lowered and record.place.phase != "optimizer"]


# ------------------------------------------------------------------ islands


def _islands(places: Sequence[Place]) -> tuple[str, ...]:
    """The modules that would have to be FP32 for none of these ops to overflow; in the order they ran."""
    kept: list[str] = []
    for place in places:
        if not _nameable(place) or any(_inside(place.module, module) for module in kept):
            continue
        behind = any(_inside(module, place.module) for module in kept)
        if behind and place.op in _PROMOTING:
            continue  # FP32 comes out of the island inside, and promotion keeps the sum in FP32
        kept = [module for module in kept if not _inside(module, place.module)]
        kept.append(place.module)
    return tuple(kept)


def _nameable(place: Place) -> bool:
    """Whether a pattern can mean the module: the outermost one has no path."""
    return bool(place.module) and place.module != place.module_type


def _inside(module: str, outer: str) -> bool:
    return module == outer or module.startswith(f"{outer}.")


def _policy(name: str, keep: tuple[str, ...]) -> str | None:
    base = _POLICIES.get(name)
    return None if base is None else str(replace(POLICIES[base], keep_fp32=keep))


def _usable(
    records: Sequence[OpRecord], places: Sequence[Place], keep: tuple[str, ...], format: Format
) -> tuple[bool, str]:
    if not places:
        return True, f"no result is beyond {format}'s {format.max:g}"
    homeless = [p for p in places if not _nameable(p) and not (keep and p.op in _PROMOTING and p.module)]
    if homeless:
        return False, (
            f"{homeless[0]} overflows outside of any submodule that could be kept in FP32 alone; bf16 has the range"
        )
    layers = list(dict.fromkeys(_layer(r.place.module) for r in records if r.place.phase == "forward"))
    crossed = list(dict.fromkeys(_layer(p.module) for p in places))
    repeated = [layer for layer in layers if layer.rpartition(".")[2].isdigit()]
    beyond = [layer for layer in crossed if layer in repeated]
    if len(beyond) >= 3 and 2 * len(beyond) > len(repeated):
        return False, (
            f"numbers are beyond {format}'s {format.max:g} in {len(beyond)} of {len(repeated)} layers, from "
            f"{beyond[0]} on: most of the model would have to be FP32; bf16 has the range"
        )
    return True, f"with {', '.join(keep)} in FP32 no result is beyond {format}'s {format.max:g}"


def _layer(module: str) -> str:
    """The path up to its first number: one of a stack of layers."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: index + 1])


# ------------------------------------------------------------------ findings


def _range_findings(prediction: FormatPrediction, policy: Policy) -> list[Finding]:
    format = formats.of(prediction.format)
    peaks = [p for p in prediction.overflows if p.place.phase == "forward" and not _kept(p.place.module, policy)]
    found = []
    unusable = bool(peaks) and not prediction.usable
    if unusable:
        found.append(
            Finding(
                "HS108",
                None,
                prediction.reason,
                f"Training in {format} would give inf and NaN from the first step on.",
                "Use bf16-mixed, or fp32 where the hardware has no bf16.",
                Severity.ERROR,
                {"overflows": len(peaks)},
            )
        )
    others = f"; {len(peaks) - 1} more ops overflow after it" if unusable and len(peaks) > 1 else ""
    for peak in peaks[:1] if unusable else peaks:
        remedy = f"Keep it in FP32: {prediction.policy}." if prediction.policy and not unusable else "Use bf16-mixed."
        found.append(
            Finding(
                "HS107",
                peak.place,
                f"FP32 gives {peak.amax:.4g}, {peak.ratio:.3g} times {format}'s largest number{others}",
                f"In {format} it is inf, and NaN soon after; no loss scale helps, it is the forward pass.",
                remedy,
                Severity.ERROR,
                {"amax": peak.amax, "ratio": peak.ratio, "max": format.max},
            )
        )
    for peak in prediction.little_headroom:
        if peak.place.phase == "forward" and not _kept(peak.place.module, policy):
            found.append(
                Finding(
                    "HS109",
                    peak.place,
                    f"FP32 gives {peak.amax:.4g}, {1 / peak.ratio:.2g} times below {format}'s largest number",
                    "It may overflow as weights grow.",
                    "Watch it, or use bf16.",
                    Severity.NOTE,
                    {"amax": peak.amax, "ratio": peak.ratio, "max": format.max},
                )
            )
    return found


def _scale_findings(prediction: FormatPrediction, scaled: bool) -> list[Finding]:
    format, found = prediction.format, []
    if prediction.window is None:
        return []
    low, high = prediction.window
    if prediction.window_is_empty:
        # A router's gradients span much: the last percent of them, in far tails of a softmax, moves nothing.
        lost = max([prediction.flushed_scaled, *(layer.scaled for layer in prediction.layers)])
        found.append(
            Finding(
                "HS204",
                None,
                f"Below a loss scale of {_power(low)} more than {TOLERANCE:.0%} of the gradients flush to zero, above "
                f"{_power(high)} the largest overflows",
                f"At a scale of {_power(prediction.loss_scale)}, {lost:.0%} of the gradients of the worst layer are "
                f"zero in {format}.",
                "Use bf16, or keep in FP32 the layers with the smallest gradients: "
                f"{', '.join(_worst(prediction)) or 'see the layers'}.",
                Severity.WARNING if lost >= SERIOUS else Severity.NOTE,
                {"low": low, "high": high, "lost": lost},
            )
        )
    if not scaled and prediction.flushed > TOLERANCE:
        worst = max(prediction.layers, key=lambda layer: layer.unscaled)
        found.append(
            Finding(
                "HS202",
                None,
                f"At least {prediction.flushed:.1%} of the gradient elements are too small for {format} "
                f"(most in {worst.layer or 'the loss'}: {worst.unscaled:.1%})",
                "They become zero, and the weights behind them do not learn.",
                f"Scale the loss: dynamically (fp16-mixed with GradScaler), or by {_power(prediction.loss_scale)}, at "
                f"which {prediction.flushed_scaled:.1%} would flush.",
                Severity.WARNING,
                {"flushed": prediction.flushed, "loss_scale": prediction.loss_scale},
            )
        )
    return found


def _power(scale: float) -> str:
    return f"2^{round(math.log2(scale))}" if 0 < scale < math.inf else "any size"


def _worst(prediction: FormatPrediction) -> list[str]:
    flushing = [layer for layer in prediction.layers if layer.scaled > TOLERANCE and layer.layer]
    return [layer.layer for layer in sorted(flushing, key=lambda layer: -layer.scaled * layer.elements)[:3]]


def _kept(module: str, policy: Policy) -> bool:
    """Whether the policy keeps the module, or one around it, in FP32 already."""
    parts = module.split(".")
    paths = [parts[: end + 1] for end in range(len(parts))]
    return any(islands._matches(path, islands._parts(pattern)) for path in paths for pattern in policy.keep_fp32)
