"""The figures of exponents and of underflow: what is drawn where, which rows there are, and that numbers are right."""

from __future__ import annotations

import math
import re

import pytest
import torch
from diagnosis_scenarios import HOSTILE, numbers

from halfstep import formats
from halfstep.observe.histogram import ExponentHistogram
from halfstep.report.figures import Chart, LayerNumbers, exponents, heatmap, layers, underflow
from halfstep.report.figures.chart import power_of_two, share, shortened
from halfstep.report.figures.exponents import lowest

NOTHING = ExponentHistogram()


def drawn(chart: Chart) -> str:
    assert chart.drawing is not None
    return chart.drawing.wide


def texts(chart: Chart) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", drawn(chart), flags=re.DOTALL)


def filled(chart: Chart, series: int) -> list[list[tuple[float, float]]]:
    """Corners of every area of this colour, in pixels."""
    areas = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: var\(--series-{series}\)', drawn(chart))
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", area)] for area in areas]


def lines(chart: Chart, series: int) -> list[list[tuple[float, float]]]:
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-{series}\)', drawn(chart))
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def exactly(exponent: int, count: int = 10) -> ExponentHistogram:
    return ExponentHistogram.of(torch.full((count,), math.ldexp(1.0, exponent)))


def test_a_column_stands_over_its_octave_and_the_scale_moves_it_right_by_as_many() -> None:
    chart = exponents([LayerNumbers("a", exactly(0), exactly(-20))], power=12)
    (activations,), (gradients,) = filled(chart, 1), filled(chart, 2)
    octave = max(x for x, _ in activations) - min(x for x, _ in activations)
    assert max(x for x, _ in gradients) - min(x for x, _ in gradients) == pytest.approx(octave, abs=0.2)
    assert min(x for x, _ in activations) - min(x for x, _ in gradients) == pytest.approx(20 * octave, abs=0.2)
    outline = max((line for line in lines(chart, 2) if len(line) >= 4), key=len)
    assert min(x for x, _ in outline) - min(x for x, _ in gradients) == pytest.approx(12 * octave, abs=0.2)
    # Activations stand above the line, gradients hang below it.
    assert min(y for _, y in activations) < min(y for _, y in gradients) < max(y for _, y in gradients)


def test_without_a_loss_scale_nothing_is_moved() -> None:
    chart = exponents([LayerNumbers("a", exactly(0), exactly(-20))])
    assert not [line for line in lines(chart, 2) if len(line) >= 4]
    assert "loss scale" not in drawn(chart)
    assert [key.label for key in chart.legend] == ["activations", "gradients"]


def test_heights_are_shares_of_the_fullest_octave() -> None:
    histogram = exactly(0, 40) + exactly(1, 10)
    ((*corners,),) = filled(exponents([LayerNumbers("a", histogram, NOTHING)]), 1)
    base = max(y for _, y in corners)
    heights = sorted({round(base - y, 1) for _, y in corners})
    assert heights == [0, 5, 20]


def test_windows_are_those_of_the_formats() -> None:
    """fp16 turns what is below 2^-25 to zero, loses bits below 2^-14, and ends at 2^16."""
    chart = exponents([LayerNumbers("a", exactly(0), NOTHING)])
    octave_start = min(x for x, _ in filled(chart, 1)[0])
    octave = max(x for x, _ in filled(chart, 1)[0]) - octave_start
    widths = []
    for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--zone\)', drawn(chart)):
        xs = [float(x) for x, _ in re.findall(r"[ML] (\S+) (\S+)", path)]
        widths.append((round((min(xs) - octave_start) / octave), round((max(xs) - octave_start) / octave)))
    assert (-25, -14) in widths and (-14, 16) in widths


@pytest.mark.parametrize("exponent", [-26, -25, -24, -15, -14, 0, 15, 16])
def test_the_windows_end_where_torch_rounds_to_zero_and_inf(exponent: int) -> None:
    """Against torch's own cast of the octave's middle."""
    value = torch.tensor(1.5 * 2.0**exponent)
    half = value.half()
    assert (half == 0).item() == (exponent < lowest(formats.of("fp16")))
    assert half.isinf().item() == (exponent > formats.of("fp16").emax)


def test_shares_at_the_side_are_what_fp16_makes_of_the_numbers() -> None:
    values = torch.exp2(torch.linspace(-40, 0, 400))
    gradients = ExponentHistogram.of(values)
    activations = ExponentHistogram.of(torch.tensor([1.0] * 99 + [2.0**17]))
    found = texts(exponents([LayerNumbers("a", activations, gradients)], power=10))
    zeros = (values.half() == 0).float().mean().item()
    scaled = ((values * 2.0**10).half() == 0).float().mean().item()
    assert f"{share(zeros)} ({share(scaled)})" in found
    assert share(0.01) in found


def test_gradients_that_the_scale_takes_beyond_fp16_are_named() -> None:
    chart = exponents([LayerNumbers("a", NOTHING, exactly(0)), LayerNumbers("b", NOTHING, exactly(-9))], power=16)
    assert "gradients of a are beyond fp16" in chart.caption


def test_numbers_far_out_are_counted_in_the_last_octave_and_that_is_said() -> None:
    many = numbers(0, -8, count=100_000)
    near = exponents([LayerNumbers("a", NOTHING, many)])
    far = exponents([LayerNumbers("a", NOTHING, many + exactly(-120, 3))])
    assert "beyond the axis" in far.caption and "beyond the axis" not in near.caption


def test_bf16_ends_are_drawn_where_numbers_reach_them() -> None:
    assert "stroke-dasharray" not in drawn(exponents([LayerNumbers("a", exactly(0), NOTHING)]))
    assert "stroke-dasharray" in drawn(exponents([LayerNumbers("a", exactly(-127), NOTHING)]))


@pytest.mark.parametrize("histogram", [NOTHING, ExponentHistogram.of(torch.tensor([0.0, math.inf, math.nan]))])
def test_without_numbers_there_is_a_sentence(histogram: ExponentHistogram) -> None:
    chart = exponents([LayerNumbers("a", histogram, histogram)])
    assert chart.drawing is None and "no numbers other than zero" in chart.caption


def test_hostile_names_are_text() -> None:
    chart = exponents([LayerNumbers(HOSTILE[-20:], exactly(0), NOTHING)])
    assert "<b>" not in drawn(chart) and "&lt;b&gt;" in drawn(chart)


# ------------------------------------------------------------------ rows


def test_few_modules_have_a_row_each() -> None:
    names = ["embed", "blocks.0.attn", "blocks.1.attn", "head", "embed"]
    chosen = layers.rows(names)
    assert chosen.of == {"embed": ("embed",), "blocks.0.attn": ("blocks.0.attn",)} | {
        name: (name,) for name in ("blocks.1.attn", "head")
    }
    assert chosen.rule == ""


def test_paths_are_cut_to_the_deepest_level_that_fits() -> None:
    names = ["embed", *(f"blocks.{i}.{part}" for i in range(12) for part in ("attn", "mlp", "norm")), "head"]
    chosen = layers.rows(names)
    assert list(chosen.of) == ["embed", *(f"blocks.{i}" for i in range(12)), "head"]
    assert chosen.of["blocks.3"] == ("blocks.3.attn", "blocks.3.mlp", "blocks.3.norm")
    assert chosen.rule == "38 modules in 14 rows: paths are cut to 2 parts."


def test_numbered_neighbours_share_a_row_in_a_deep_model() -> None:
    names = ["embed", *(f"blocks.{i}.{part}" for i in range(96) for part in ("attn", "mlp")), "head"]
    chosen = layers.rows(names)
    assert list(chosen.of)[:3] == ["embed", "blocks.0–4", "blocks.5–9"]
    assert list(chosen.of)[-2:] == ["blocks.95", "head"]
    assert "5 numbered neighbours share a row" in chosen.rule


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(1000)],
        [f"layer_{i}" for i in range(1000)],
        [f"a.{i}.{j}.{k}" for i in range(9) for j in range(9) for k in range(9)],
        [f"m.{'abcdefghij'[i % 10]}{i}.{j}" for i in range(100) for j in range(3)],
        ["", *(f"x{i}.y" for i in range(30))],
        [f"x.٣.{i}" for i in range(40)],
    ],
    ids=lambda names: names[-1],
)
def test_there_are_never_too_many_rows_and_no_module_is_lost(names: list[str]) -> None:
    chosen = layers.rows(names)
    assert 1 < len(chosen.of) <= layers.MOST_ROWS
    assert sorted(module for row in chosen.of.values() for module in row) == sorted(names)
    assert chosen.rule.startswith(f"{len(names):,} modules in {len(chosen.of)} rows: ")
    assert chosen.rule.endswith(("share a row.", "parts.", "part."))


# ------------------------------------------------------------------ heat map


def test_a_cell_is_the_worst_of_its_steps_and_layers() -> None:
    steps = [(step, {f"a.{i}": (step == 77) * (i == 40) * 0.7 for i in range(96)}, True) for step in range(1, 301)]
    shares = heatmap.reduced(steps)
    assert shares is not None and shares.size == 3 and len(shares.starts) == 100
    assert shares.values.shape == (len(shares.rows.of), 100)
    row = next(at for at, modules in enumerate(shares.rows.of.values()) if "a.40" in modules)
    expected = torch.zeros(shares.values.shape, dtype=torch.float64)
    expected[row, (77 - 1) // 3] = 0.7
    assert torch.equal(torch.from_numpy(shares.values), expected)
    assert "A column is 3 steps." in underflow(steps).caption


def test_steps_and_layers_that_are_missing_stay_empty() -> None:
    shares = heatmap.reduced([(5, {"a": 0.1}, True), (7, {"b": math.nan, "a": 0.2}, False)])
    assert shares is not None and shares.starts == (5, 6, 7)
    assert [math.isnan(v) for v in shares.values.ravel()] == [False, True, False, True, True, True]
    assert shares.skipped == (False, False, True)


def test_the_worst_is_named_and_skips_are_marked() -> None:
    chart = underflow([(1, {"a": 0.0, "b": 0.02}, False), (2, {"a": 0.33, "b": 0.02}, True)])
    assert "The worst: 33 % in a, step 2." in chart.caption
    assert "A dot above marks a step that was skipped." in chart.caption


@pytest.mark.parametrize(
    ("value", "shade"), [(0.0, 0), (0.001, 0), (0.0011, 1), (0.05, 2), (0.5, 4), (0.51, 5), (1, 5)]
)
def test_every_share_has_one_shade(value: float, shade: int) -> None:
    chart = underflow([(1, {"a": value}, True)])
    cells = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--(series-2|zone)\)(; opacity: [\d.]+)?', drawn(chart))
    # The six squares of the key come last, one per shade and in order; the cell looks like one of them.
    key, (cell,) = cells[-6:], cells[:-6]
    assert [look[1:] for look in key].index(cell[1:]) == shade


@pytest.mark.parametrize("steps", [[], [(1, {}, True)], [(1, {"a": math.nan}, True)]])
def test_without_shares_there_is_a_sentence(steps: list[tuple[int, dict[str, float], bool]]) -> None:
    assert underflow(steps).drawing is None


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (1e-9, "< 0.1 %"),
        (0.001, "0.1 %"),
        (0.0994, "9.9 %"),
        (0.0996, "10 %"),
        (0.43, "43 %"),
        (0.9994, "> 99.9 %"),
        (0.997, "99.7 %"),
        (1.0, "100 %"),
    ],
)
def test_shares_in_words(value: float, text: str) -> None:
    assert share(value) == text


def test_names_keep_their_end() -> None:
    assert shortened("model.layers.0.mlp", 8) == "…s.0.mlp"
    assert shortened("just.fit", 8) == "just.fit"


def test_powers_of_two() -> None:
    assert [power_of_two(p) for p in (-24, 0, 15)] == ["2⁻²⁴", "2⁰", "2¹⁵"]
