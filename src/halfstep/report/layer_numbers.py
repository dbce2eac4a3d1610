"""The numbers of a profiled step, layer by layer: what the figure of exponents draws."""

from __future__ import annotations

from collections.abc import Sequence

from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.profile import Profile
from halfstep.report.figures import LayerNumbers
from halfstep.report.figures.layers import OUTSIDE, rows


def of_profile(profile: Profile) -> tuple[Sequence[LayerNumbers], str]:
    """Activations and gradients per row, and a sentence on which they are.

    Activations are what forward ops made, gradients what backward ops made. As in the predictions, only results that
    would be in 16 bits count, where there are any: the others do not change.
    """
    every = [record for record in profile.records.values() if record.place.phase != "optimizer"]
    lowered = [record for record in every if record.lowered]
    forward: dict[str, list[ExponentHistogram]] = {}
    backward: dict[str, list[ExponentHistogram]] = {}
    for record in lowered or every:
        of_phase = forward if record.place.phase == "forward" else backward
        of_phase.setdefault(record.place.module, []).append(record.histogram)
    chosen = rows([*forward, *backward])
    layers = [
        LayerNumbers(
            name or OUTSIDE,
            ExponentHistogram.merge(h for module in modules for h in forward.get(module, ())),
            ExponentHistogram.merge(h for module in modules for h in backward.get(module, ())),
        )
        for name, modules in chosen.of.items()
    ]
    which = "Only results that autocast would make 16-bit are counted." if lowered else ""
    return layers, " ".join(filter(None, (which, chosen.rule)))
