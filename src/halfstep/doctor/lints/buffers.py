"""Averages and constants stored in 16 bits: running statistics, copies of the weights, positions, frequencies.

What a buffer holds is told from its values, not from its name. A *ramp* is what lies within a rounding of a straight
line, as positions do: beyond 2^(m + 1) the format has no room for every whole number, and neighbours become equal.
*Frequencies* are positive, fall, and lie within a rounding of a geometric series, as those of rotary and sinusoidal
embeddings do: multiplied by a position, their rounding error grows with it and becomes an angle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints.setting import LOW_PRECISION, Setting, finding, format_of, some
from halfstep.formats import Format
from halfstep.optim.layout import local

_SHORTEST_RAMP = 8
_SHORTEST_SERIES = 4
_POSITION = 4096  # at which a phase error is stated


def statistics(setting: Setting) -> Iterator[Finding]:
    """HS310: running statistics that training moves, and averaged copies of the weights, in 16 bits."""
    if not setting.training:
        return
    yield from _running(setting)
    yield from _averaged(setting)
    yield from _copies(setting)


def constants(setting: Setting) -> Iterator[Finding]:
    """HS409: positions and frequencies among the 16-bit buffers."""
    found: dict[tuple[str, str, int, float], list[tuple[str, nn.Module, str]]] = {}
    said: dict[tuple[str, str, int, float], tuple[str, str, str, dict[str, float]]] = {}
    for path, module in setting.parts():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype not in LOW_PRECISION or buffer.is_meta or max(buffer.shape, default=0) < buffer.numel():
                continue  # 1-D but for dimensions of one
            values, format = local(buffer.detach()).reshape(-1).double().cpu(), format_of(buffer)
            if values.numel() == 0 or not values.isfinite().all():
                continue
            collisions, phase = ramp_collisions(values, format), phase_error(values, format)
            if collisions:
                key = ("ramp", str(format), values.numel(), float(collisions))
                said[key] = (
                    f"holds a ramp of {values.numel():,} values in {format}, of which {collisions:,} equal "
                    "their neighbour",
                    "Positions that are equal here cannot be told apart by the model.",
                    "Keep it as integers or in FP32, and cast what is computed from it.",
                    {"values": values.numel(), "collisions": collisions},
                )
            elif phase:
                key = ("series", str(format), values.numel(), phase)
                said[key] = (
                    f"holds {values.numel():,} frequencies in {format}; rounding moves the angle at position "
                    f"{_POSITION} by up to {phase * _POSITION:.2g} rad, and by up to one at {1 / phase:,.0f}",
                    "Sines and cosines of far positions are of the wrong angle, the further the more.",
                    "Keep it in FP32 (module.to(dtype) converts buffers too: set it again afterwards), and cast the "
                    "sines and cosines.",
                    {"values": values.numel(), "phase_error": phase * _POSITION, "position": 1 / phase},
                )
            else:
                continue
            found.setdefault(key, []).append((path, module, name))
    for key, places in found.items():
        what, consequence, remedy, numbers = said[key]
        path, module, name = places[0]
        more = f" (so do {len(places) - 1} more like it)" if len(places) > 1 else ""
        yield finding(
            "HS409",
            setting.at_module(path, module, name),
            Severity.WARNING,
            f"buffer {name} {what}{more}",
            consequence,
            remedy,
            format=key[1],
            buffers=len(places),
            **numbers,
        )


def ramp_collisions(values: Tensor, format: Format) -> int:
    """How many values of a ramp equal their neighbour; 0 where it is no ramp.

    Args:
        values: float64 (n,), what a 16-bit buffer holds.
    """
    count = values.numel()
    if count < _SHORTEST_RAMP or values[0] == values[-1]:
        return 0
    steps = values.diff()
    if not ((steps >= 0).all() or (steps <= 0).all()):
        return 0
    # Half a spacing for the value's own rounding, and half of the ends', in proportion along the line, for theirs.
    line = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device)
    ideal = values[0] + (values[-1] - values[0]) * line
    ends = format.ulp(values[[0, -1]]) / 2
    slack = torch.maximum(format.ulp(ideal), format.ulp(values)) / 2 + ends[0] * (1 - line) + ends[1] * line
    if not ((values - ideal).abs() <= slack * (1 + 1e-9)).all():  # ties lie on the bound
        return 0
    return int((steps == 0).sum())


def phase_error(values: Tensor, format: Format) -> float:
    """Half the widest spacing among frequencies that had to be rounded: radians per position; 0 where there are none.

    Powers of two are taken for exact: the first frequency is 1 as a rule.

    Args:
        values: float64 (n,), what a 16-bit buffer holds.
    """
    count = values.numel()
    if count < _SHORTEST_SERIES or not (values > 0).all() or not (values.diff() < 0).all():
        return 0.0
    logarithms = values.log2()
    line = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device)
    ideal = logarithms[0] + (logarithms[-1] - logarithms[0]) * line
    relative = format.ulp(values) / values / math.log(2)  # a spacing, in octaves
    slack = relative / 2 + relative[0] / 2 * (1 - line) + relative[-1] / 2 * line
    if not ((logarithms - ideal).abs() <= 1.01 * slack).all():  # 1.01: the logarithm's curvature over one spacing
        return 0.0
    rounded = values[logarithms != logarithms.round()]
    return float(format.ulp(rounded).max() / 2) if rounded.numel() else 0.0


def _running(setting: Setting) -> Iterator[Finding]:
    """Running means and variances of modules that are in training mode."""
    found: dict[tuple[Format, float | None], list[tuple[str, nn.Module, str]]] = {}
    layers: dict[str, int] = {}
    for path, module in setting.parts():
        kept = [(n, b) for n, b in module.named_buffers(recurse=False) if n.startswith("running_")]
        if not kept or not module.training:
            continue
        layers[type(module).__name__] = layers.get(type(module).__name__, 0) + 1
        low = [(name, buffer) for name, buffer in kept if buffer.dtype in LOW_PRECISION]
        if low:
            name, buffer = low[0]
            found.setdefault((format_of(buffer), getattr(module, "momentum", None)), []).append((path, module, name))
    for (format, momentum), places in found.items():
        path, module, name = places[0]
        share = None if not momentum else format.eps / 2 / momentum
        yield finding(
            "HS310",
            setting.at_module(path, module, name),
            Severity.WARNING,
            f"{some(len(places), sum(layers.values()), 'module')} with running statistics "
            f"{'keeps' if sum(layers.values()) == 1 else 'keep'} them in {format}; first: {path}.{name}",
            "They stop moving once they are within "
            + ("a rounding" if share is None else f"about {share:.1%}")
            + " of the batch's: each step takes up only a part of the difference, and that rounds away.",
            "Keep these modules in FP32 (module.float() on them; halfstep's master policies do).",
            modules=len(places),
            format=str(format),
            **({} if share is None else {"share": share}),
        )


def _averaged(setting: Setting) -> Iterator[Finding]:
    """Modules that count how many models they have averaged, as `torch.optim.swa_utils.AveragedModel` does."""
    for path, module in setting.parts():
        if "n_averaged" not in module._buffers:
            continue
        kept: list[Tensor] = list(module.parameters())
        low = [parameter for parameter in kept if parameter.dtype in LOW_PRECISION]
        if low:
            yield _average(setting, path, module, low, len(kept), Severity.WARNING, "averages models in")


def _copies(setting: Setting) -> Iterator[Finding]:
    """Modules that look like an average of another: same class, names and shapes, close in value, without gradients."""
    trained = {id(parameter) for parameter in setting.trained()}
    models: dict[tuple[object, ...], list[nn.Module]] = {}
    frozen: list[tuple[str, nn.Module, tuple[object, ...]]] = []
    inside: set[int] = set()
    for path, module in setting.parts():
        named = list(module.named_parameters())
        if len(named) < 2 or id(module) in inside:
            continue
        shape = (type(module), *((name, parameter.shape) for name, parameter in named))
        if all(id(parameter) in trained for _, parameter in named):
            models.setdefault(shape, []).append(module)
        elif all(not p.requires_grad and p.dtype in LOW_PRECISION and not p.is_meta for _, p in named):
            frozen.append((path, module, shape))
            inside.update(id(part) for part in module.modules())
    for path, module, shape in frozen:
        if any(_is_close(module, model) for model in models.get(shape, [])):
            low: list[Tensor] = list(module.parameters())
            what = "is a copy of a model in training (if it is its average, and not a fixed reference) in"
            yield _average(setting, path, module, low, len(low), Severity.NOTE, what)


def _is_close(copy: nn.Module, model: nn.Module) -> bool:
    """Nearer to it than two random models of one kind, whose difference is larger than either."""
    distance = norm = 0.0
    for a, b in zip(copy.parameters(), model.parameters(), strict=True):
        if b.is_meta or a.device != b.device:
            return False
        ours, theirs = local(a.detach()).float(), local(b.detach()).float()
        distance += float((ours - theirs).square().sum())
        norm += float(theirs.square().sum())
    return distance <= 0.25 * norm


def _average(
    setting: Setting, path: str, module: nn.Module, low: list[Tensor], total: int, severity: Severity, what: str
) -> Finding:
    format = format_of(low[0])
    return finding(
        "HS310",
        setting.at_module(path, module, setting.name(low[0])),
        severity,
        f"{path} {what} {format}: {some(len(low), total, 'parameter')}; first: {setting.name(low[0])}",
        f"In {format} an average that takes up 1/n of what differs stops near n = {2 ** (format.mantissa_bits + 1)}, "
        "and one with a decay of 0.999 moves only by differences larger than "
        f"{min(1.0, format.eps / 2 / 0.001):.0%} of the weight.",
        "Keep the average in FP32.",
        parameters=len(low),
        format=str(format),
    )
