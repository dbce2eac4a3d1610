"""HS408: discrete decisions that rounding flips."""

from __future__ import annotations

import pytest
import torch
from events import event_of, findings_of
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.doctor.detectors.decisions import _at_least, flipped_decisions
from halfstep.doctor.event import OpEvent
from halfstep.doctor.examination import Examination
from halfstep.doctor.finding import Finding, Severity

ATEN = torch.ops.aten
BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choose(scores: torch.Tensor, func: object = ATEN.topk.default, *args: object, dtype: torch.dtype = BF16) -> OpEvent:
    rounded = scores.to(dtype)
    return event_of(func, rounded, *args, shadows=[(rounded, scores)])


def wrong_rows(scores: torch.Tensor, k: int, dtype: torch.dtype) -> int:
    """Row by row, as sets."""
    rounded = scores.to(dtype)
    return sum(
        set(mine.topk(k).indices.tolist()) != set(theirs.topk(k).indices.tolist())
        for mine, theirs in zip(rounded, scores, strict=True)
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
def test_flips_are_counted_as_sets(seed: int, k: int) -> None:
    scores = random(400, 64, seed=seed)
    found = findings_of(flipped_decisions, choose(scores, ATEN.topk.default, k))
    wrong = wrong_rows(scores, k, BF16)
    if found:
        assert found[0].numbers["rows_differing"] == wrong
        assert found[0].numbers["rows"] == 400
    else:
        assert wrong / (400 * k) < 0.02  # too few to be sure of one in four hundred


def test_a_router_that_decides_on_rounded_scores() -> None:
    scores = (random(4096, 64) / 4).softmax(-1)
    suspicions = list(flipped_decisions(choose(scores, ATEN.topk.default, 2)))
    (suspicion,) = suspicions
    assert suspicion.finding.code == "HS408"
    assert suspicion.finding.severity == Severity.WARNING
    assert suspicion.outputs == (0,)


def test_inherited_flips_are_a_note_until_they_are_many() -> None:
    exact = random(4096, 64)
    for noise, severity in ((2.0**-8, Severity.NOTE), (2.0**-3, Severity.WARNING)):
        scores = exact * (1 + noise * random(4096, 64, seed=1))
        event = event_of(ATEN.topk.default, scores, 2, shadows=[(scores, exact)])
        (finding,) = findings_of(flipped_decisions, event)
        assert finding.severity == severity


def test_a_few_rows_are_a_note() -> None:
    """The same router on fewer tokens: the same share, and nothing that another batch would have to show."""
    scores = (random(4096, 64) / 4).softmax(-1)
    severities = []
    for rows in (512, 4096):
        event = choose(scores[:rows], ATEN.topk.default, 2)
        (finding,) = findings_of(flipped_decisions, event)
        severities.append((finding.severity, int(finding.numbers["rows_differing"]) >= 32))
    assert severities == [(Severity.NOTE, False), (Severity.WARNING, True)]


def test_another_dimension() -> None:
    scores = random(64, 4096)
    (finding,) = findings_of(flipped_decisions, choose(scores, ATEN.topk.default, 2, 0))
    assert finding.numbers["rows"] == 4096
    assert finding.numbers["rows_differing"] == wrong_rows(scores.T, 2, BF16)


def test_the_order_of_the_chosen_means_nothing() -> None:
    scores = torch.tensor([[1.001, 1.0, 0.0, -1.0]]).repeat(512, 1)
    event = choose(scores, ATEN.topk.default, 2)
    mine, theirs = event.decisions[0]
    assert theirs is not None
    assert not torch.equal(mine, theirs)
    assert findings_of(flipped_decisions, event) == []


def test_what_is_read_for_a_metric_is_a_note() -> None:
    scores = random(4096, 256)
    for event in (choose(scores, ATEN.argmax.default, -1), choose(scores, ATEN.max.dim, -1)):
        (finding,) = findings_of(flipped_decisions, event)
        assert finding.severity == Severity.NOTE


QUIET = {
    "nothing rounded": lambda: event_of(ATEN.topk.default, random(512, 64), 2),
    "clear cases": lambda: choose(random(512, 8).argsort(-1).float(), ATEN.topk.default, 2),
    "one flip": lambda: choose(
        torch.cat([torch.tensor([[1.0, 1.001, 0.0]]), torch.eye(3).repeat(21, 1)]), ATEN.topk.default, 1
    ),
    "a full sort": lambda: choose(random(512, 64), ATEN.sort.default),
    "comparison": lambda: choose(random(512, 64) * 1e-3 + 1, ATEN.gt.Scalar, 1.0),
    "whole numbers": lambda: event_of(ATEN.topk.default, torch.arange(64), 2),
    "empty": lambda: choose(torch.empty(0, 8), ATEN.topk.default, 2),
    "fp32": lambda: choose(random(512, 64), ATEN.topk.default, 2, dtype=torch.float32),
}


@pytest.mark.parametrize("what", QUIET)
def test_quiet(what: str) -> None:
    assert findings_of(flipped_decisions, QUIET[what]()) == []


def test_what_a_sample_proves() -> None:
    """Wilson's interval: at its lower end p, a share of count/n is 1.645 standard deviations of p above p."""
    for count, n in ((1, 32), (2, 64), (150, 16384), (64, 64)):
        p = _at_least(count, n)
        assert 0 <= p < count / n
        assert count / n == pytest.approx(p + 1.645 * (p * (1 - p) / n) ** 0.5, rel=1e-6)
    assert _at_least(0, 100) == pytest.approx(0, abs=1e-12)


def examined(fn) -> list[Finding]:  # type: ignore[no-untyped-def]
    with Examination(detectors=[flipped_decisions]) as examination:
        examination.returned(fn())
    return examination.findings()


def test_only_choices_that_are_used() -> None:
    x, gate = random(4096, 64), random(64, 64, seed=1) / 32

    def routed(dtype: torch.dtype, used: bool) -> torch.Tensor:
        weights, _ = (x.to(dtype) @ gate.to(dtype)).softmax(-1).topk(2)
        return (x * weights.sum(-1, keepdim=True)).sum() if used else x.sum()

    assert [f.code for f in examined(lambda: routed(BF16, used=True))] == ["HS408"]
    assert examined(lambda: routed(BF16, used=False)) == []
    assert examined(lambda: routed(torch.float32, used=True)) == []
