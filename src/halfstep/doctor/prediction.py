"""`FormatPrediction`: what one FP32 step says about training in another format. Data only; `predict` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from halfstep.observe.place import Place
from halfstep.record import strict_json


@dataclass(frozen=True)
class Peak:
    """The largest number an op made, against what the format can hold."""

    place: Place
    amax: float
    ratio: float  #: amax over the format's largest number: above 1 it overflows


@dataclass(frozen=True)
class LayerUnderflow:
    """The gradients that arise in one module: share of the non-zero elements that become zero, *at least*.

    A lower bound: where a gradient is flushed, those computed from it are flushed too, which FP32 does not show.
    """

    layer: str  #: module path; empty: outside of modules
    elements: int  #: non-zero gradient elements seen
    unscaled: float  #: share flushed at loss scale 1
    scaled: float  #: share flushed at `FormatPrediction.loss_scale`


@dataclass(frozen=True)
class FormatPrediction:
    """One format's prospects for the model and step that the profile saw.

    Of the tensors that autocast would keep in FP32 nothing is said: they do not change.
    """

    format: str
    ops: int  #: places whose results would be in this format; 0: it would change nothing
    overflows: tuple[Peak, ...] = ()  #: in the order they ran
    little_headroom: tuple[Peak, ...] = ()  #: in range, but by less than a factor of 2
    layers: tuple[LayerUnderflow, ...] = ()  #: in the order of their first gradient
    flushed: float = 0.0  #: share of all non-zero gradient elements that flush at loss scale 1, at least
    flushed_scaled: float = 0.0  #: at `loss_scale`
    loss_scale: float = 1.0  #: static, a power of two; 1 where the format has FP32's range
    #: Smallest and largest power of two between which a static scale neither flushes more than `predict.TOLERANCE` of
    #: the gradient elements nor lets one overflow; empty if the first is larger. None: any scale does.
    window: tuple[float, float] | None = None
    keep_fp32: tuple[str, ...] = ()  #: modules that would have to stay FP32
    policy: str | None = None  #: as a policy that `halfstep.policy.parse` reads; None where there is none
    usable: bool = True
    reason: str = ""  #: one sentence, why usable or not

    @property
    def window_is_empty(self) -> bool:
        """Whether every static scale flushes gradients or overflows."""
        return self.window is not None and self.window[0] > self.window[1]

    def to_json(self) -> dict[str, Any]:
        """Plain values; non-finite numbers as the strings that run records use."""
        peaks = {
            name: [{**vars(peak), "place": dict(vars(peak.place))} for peak in getattr(self, name)]
            for name in ("overflows", "little_headroom")
        }
        plain: dict[str, Any] = strict_json({**vars(self), **peaks, "layers": [dict(vars(x)) for x in self.layers]})
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FormatPrediction:
        """The prediction that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it did not write this.
        """
        given = {field.name: values[field.name] for field in fields(cls)}
        for name in ("overflows", "little_headroom"):
            given[name] = tuple(
                Peak(Place(**peak["place"]), float(peak["amax"]), float(peak["ratio"])) for peak in given[name]
            )
        given["layers"] = tuple(
            LayerUnderflow(x["layer"], int(x["elements"]), float(x["unscaled"]), float(x["scaled"]))
            for x in given["layers"]
        )
        for name in ("flushed", "flushed_scaled", "loss_scale"):
            given[name] = float(given[name])
        if given["window"] is not None:
            low, high = given["window"]
            given["window"] = (float(low), float(high))
        given["keep_fp32"] = tuple(given["keep_fp32"])
        return cls(**given)
