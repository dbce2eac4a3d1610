"""HS404, HS405: casts that make different numbers equal."""

from __future__ import annotations

import math

import pytest
import torch
from events import event_of, findings_of

from halfstep.doctor.detectors.casts import colliding_values
from halfstep.doctor.event import OpEvent
from halfstep.doctor.examination import Examination
from halfstep.doctor.finding import Finding, Severity
from halfstep.observe.place import Place

ATEN = torch.ops.aten
HALF, BF16 = torch.float16, torch.bfloat16


def cast(x: torch.Tensor, dtype: torch.dtype = BF16, made_by: str | None = None) -> OpEvent:
    made = {0: Place(made_by, file="train.py", line=1)} if made_by else {}
    return event_of(ATEN._to_copy.default, x, dtype=dtype, made_by=made)


def codes(event: OpEvent) -> list[str]:
    return [finding.code for finding in findings_of(colliding_values, event)]


# ------------------------------------------------------------------ ramps


@pytest.mark.parametrize(("dtype", "exact_up_to"), [(BF16, 256), (HALF, 2048)])
@pytest.mark.parametrize("n", [255, 257, 258, 1000, 1200, 2049, 2050, 5000])
def test_positions_are_counted_as_a_set_counts_them(dtype: torch.dtype, exact_up_to: int, n: int) -> None:
    x = torch.arange(n, dtype=torch.float32)
    rounded = x.to(dtype).tolist()
    left = len(set(rounded))
    found = findings_of(colliding_values, cast(x, dtype))
    if n <= exact_up_to + 1:  # 0, 1, …, 2**p
        assert found == []
        return
    (finding,) = found
    first = next(i for i, value in enumerate(rounded) if value != i)
    assert finding.code == "HS404"
    assert finding.severity == (Severity.ERROR if left <= n / 2 else Severity.WARNING)
    assert {k: finding.numbers[k] for k in ("values", "left", "first_wrong")} == {
        "values": n,
        "left": left,
        "first_wrong": first,
    }


RAMP = torch.arange(0.0, 600.0)
RAMPS = {
    "whole numbers": RAMP.long(),
    "falling": RAMP.flip(0),
    "offset": RAMP[:3] + 1000,
    "column": RAMP[:, None],
    "row of a batch": RAMP[None].expand(4, -1),
    "batch, contiguous": RAMP[None].repeat(4, 1),
    "batches of their own": torch.stack([RAMP, RAMP + 7]),
    "grid": torch.linspace(0.5, 0.6, 100),
    "schedule": torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0),
    "outer product": torch.outer(RAMP, 10_000.0 ** -torch.arange(0, 1, 1 / 16)),
    "outer product, transposed": torch.outer(10_000.0 ** -torch.arange(0, 1, 1 / 16), RAMP),
    "many frequencies": torch.outer(torch.linspace(0, 60, 100).sin() + 2, RAMP),
    "with other dimensions": RAMP[None, None].expand(4, 1, -1),
    "float64": RAMP.double(),
}


@pytest.mark.parametrize("shape", RAMPS)
def test_ramps_of_many_shapes(shape: str) -> None:
    assert codes(cast(RAMPS[shape])) == ["HS404"]


def test_copying_into_16_bits_is_a_cast() -> None:
    assert codes(event_of(ATEN.copy_.default, torch.empty(600, dtype=BF16), RAMP)) == ["HS404"]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


QUIET = {
    "exact": RAMP[:257],
    "frequencies": 10_000.0 ** -torch.arange(0, 1, 1 / 32),
    "activations": random(64, 256),
    "a bias": random(256),
    "sorted, short": random(8).sort().values,
    "in order by chance": torch.tensor([1.0, 1.001, 1.5, 1.7, 2.2, 2.9]),
    "equal": torch.ones(512),
    "one": torch.tensor([1001.0]),
    "a number": torch.tensor(1001.0),
    "empty": torch.empty(0),
    "a mask": torch.full((600, 600), -torch.inf).triu(1),
    "bool": torch.ones(600, dtype=torch.bool),
    "token ids": torch.randint(0, 256, (4, 32)),
    "cosines": torch.cos(torch.outer(RAMP, 10_000.0 ** -torch.arange(0, 1, 1 / 16))),
}


@pytest.mark.parametrize("what", QUIET)
def test_quiet(what: str) -> None:
    assert codes(cast(QUIET[what])) == []


def test_casts_to_wider_formats_are_quiet() -> None:
    assert codes(cast(torch.arange(600.0), torch.float64)) == []
    assert codes(cast(torch.arange(600.0).to(BF16), torch.float32)) == []
    assert codes(cast(torch.arange(600.0).to(BF16), HALF)) == []


def test_a_ramp_beyond_the_range_is_an_overflow() -> None:
    assert codes(cast(torch.arange(0.0, 70_000.0, 100.0), HALF)) == []


def test_weights_are_not_positions() -> None:
    weight = torch.nn.Parameter(RAMP.clone(), requires_grad=False)
    assert codes(cast(weight)) == []


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_inputs_that_become_equal(shape: tuple[int, ...]) -> None:
    x = torch.tensor([700.9, 500.25, 699.4, 12.5])  # bf16 knows 500, 700, 704
    (finding,) = findings_of(colliding_values, cast(x.reshape(shape)))
    assert (finding.code, finding.severity) == ("HS405", Severity.WARNING)
    assert (finding.numbers["pairs"], finding.numbers["changed"]) == (1, 3)
    assert "both become 700" in finding.what


def test_a_whole_number_that_becomes_another() -> None:
    assert codes(cast(torch.tensor([987, 12]))) == ["HS405"]
    assert codes(cast(torch.tensor([987.0, 12.0]))) == ["HS405"]
    assert codes(cast(torch.tensor([988.0, 12.0]))) == []
    assert codes(cast(torch.tensor([987.0, 12.0]), HALF)) == []


BATCHES = {
    "less than a step apart": torch.tensor([700.9, 700.2, 12.5]),
    "equal before": torch.tensor([700.9, 700.9, 12.5]),
    "normalized": random(512),
    "a table": random(64, 8) * 1000,
    "long": random(8192) * 1000,
}


@pytest.mark.parametrize("what", BATCHES)
def test_batches_that_are_fine(what: str) -> None:
    assert codes(cast(BATCHES[what])) == []


@pytest.mark.parametrize(("made_by", "fires"), [("index", True), ("rand", True), ("mm", False), ("mean", False)])
def test_only_inputs_count(made_by: str, fires: bool) -> None:
    assert bool(codes(cast(torch.tensor([700.9, 500.25, 699.4, 12.5]), made_by=made_by))) == fires


# ------------------------------------------------------------------ what reaches something


def examined(fn) -> list[Finding]:  # type: ignore[no-untyped-def]
    with Examination(detectors=[colliding_values]) as examination:
        examination.returned(fn())
    return examination.findings()


def sinusoids(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(x.float()[:, None] * torch.exp(-math.log(10_000.0) * torch.arange(8) / 8))


def test_positions_count_where_a_cosine_follows() -> None:
    assert [f.code for f in examined(lambda: sinusoids(torch.arange(0.0, 600.0).to(BF16)))] == ["HS404"]
    assert examined(lambda: sinusoids(torch.arange(0.0, 250.0).to(BF16))) == []
    # As numbers of a 16-bit format they are what such numbers are: right to 2**-9.
    assert examined(lambda: torch.arange(0.0, 600.0).to(BF16)) == []


def test_timesteps_count_where_a_cosine_follows() -> None:
    t = torch.tensor([700.9, 500.25, 699.4, 12.5])
    assert [f.code for f in examined(lambda: sinusoids(t.to(BF16)))] == ["HS405"]
    assert examined(lambda: sinusoids(t)) == []
    assert examined(lambda: t.to(BF16) / 1000) == []


@pytest.mark.parametrize(
    "event",
    [
        lambda: event_of(ATEN.arange.default, 600, dtype=BF16),
        lambda: event_of(ATEN.arange.start_step, 0, 1200, 2, dtype=BF16),
        lambda: event_of(ATEN.linspace.default, 0, 599, 600, dtype=BF16),
    ],
    ids=["arange", "arange by 2", "linspace"],
)
def test_ramps_are_compared_with_the_same_ramp_in_fp32(event) -> None:  # type: ignore[no-untyped-def]
    (finding,) = findings_of(colliding_values, event())
    assert (finding.code, finding.numbers["values"]) == ("HS404", 600)


@pytest.mark.parametrize(
    "positions",
    [
        lambda: torch.arange(600, dtype=BF16),
        lambda: torch.linspace(0, 599, 600, dtype=BF16),
        lambda: torch.arange(600).to(BF16),
    ],
    ids=["arange", "linspace", "whole numbers"],
)
def test_ramps_made_in_16_bits(positions) -> None:  # type: ignore[no-untyped-def]
    assert [f.code for f in examined(lambda: sinusoids(positions()))] == ["HS404"]
