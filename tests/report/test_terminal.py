"""The comparison in a terminal of 80 columns."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import scenarios
from rich.console import Console

from halfstep.report import terminal, wording


def printed(scene: scenarios.Scene, width: int = 80, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    terminal.print_comparison(console, scene[1])
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("scene", scenarios.ALL, ids=lambda scene: scene.__name__)
def test_nothing_is_wider_than_80_columns_and_the_verdict_stands_last(scene) -> None:
    text = printed(scene())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    # Words longer than a line are broken; compare without any white space.
    assert "".join(text.split()).endswith("".join(scene()[1].verdict.replace("\udcff", "?").split()))


def test_every_number_is_whole() -> None:
    scene = scenarios.three_policies()
    text = printed(scene)
    table = text[: text.index("failed")]
    for result in scene[1].policies:
        assert result.policy in table and result.speed is not None
        expected = [wording.milliseconds(result.speed.median_seconds), wording.quartiles(result.speed)]
        expected += [*wording.speed_up(result.speed.speed_up)] if result.speed.speed_up else []
        expected += [wording.size(result.peak_bytes)] if result.peak_bytes else []
        for quality in result.quality:
            expected.append(wording.number(quality.final_loss, 4))
            if quality.difference:
                expected += " ".join(wording.difference(quality.difference)).split()
        for number in expected:
            assert number in table.split() or number in table


def test_errors_warnings_and_notices_are_printed() -> None:
    scene = scenarios.three_policies()
    text = words(printed(scene))
    assert "fp16-mixed failed: RuntimeError: can't allocate 8 GB" in text
    assert "fp16-mixed: FP16 products are slow on this CPU" in text
    for warning in scene[1].warnings:
        assert words(warning) in text


def test_each_optimizer_has_its_line() -> None:
    lines = printed(scenarios.gan()).splitlines()
    assert sum(line.startswith("  optimizer 0") for line in lines) == 2
    assert sum(line.startswith("  optimizer 1") for line in lines) == 2


def test_whose_memory_it_is_is_said_where_there_are_two() -> None:
    text = words(printed(scenarios.on_a_gpu()))
    assert (
        "memory: tensors at the peak of a step, in the memory of cuda; the allocator's own peak in the run: "
        "fp32 6.00 GiB, bf16-mixed 3.60 GiB; in the host's memory: fp32 7.00 GiB, bf16-mixed 7.00 GiB"
    ) in text
    assert "in the memory of" not in words(printed(scenarios.three_policies()))


def test_markup_in_words_is_not_obeyed() -> None:
    scene = scenarios.hostile()
    text = "".join(printed(scene).split())
    (error,) = scene[1].policies[1].errors
    assert "[red]" in error
    assert "".join(f"bf16-mixed failed: {error}".replace("\udcff", "?").split()) in text


def test_terminal_codes_and_broken_text_do_not_reach_the_terminal() -> None:
    comparison = replace(scenarios.one_seed()[1], verdict="fp32 \x1b[31mwon\udcff.")
    text = printed(([], comparison))
    assert "fp32 [31mwon?." in text
    text.encode("utf-8")


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = printed(scenarios.three_policies(), force_terminal=True, color_system="standard")
    assert "\x1b[3" in coloured or "\x1b[1;3" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(scenarios.three_policies(), force_terminal=True, color_system="standard")
    assert not any(f"[{code}m" in plain for code in ("31", "32", "33", "36", "1;33"))


def test_a_table_alone_is_renderable_at_any_width() -> None:
    _, comparison = scenarios.three_policies()
    for width in (60, 80, 200):
        console = Console(file=io.StringIO(), width=width)
        console.print(terminal.comparison_table(comparison, width))
        assert "bf16-mixed" in console.file.getvalue()  # type: ignore[attr-defined]
