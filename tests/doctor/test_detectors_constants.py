"""HS401, HS402, HS403: constants that round to 0, to 1, or to inf."""

from __future__ import annotations

import pytest
import torch
from events import event_of, findings_of
from torch.nn import functional as F  # noqa: N812  # as everywhere

from halfstep.doctor.detectors.constants import rounded_constants
from halfstep.doctor.event import OpEvent
from halfstep.doctor.examination import Examination
from halfstep.doctor.finding import Finding, Severity
from halfstep.observe.place import Place

ATEN = torch.ops.aten
HALF, BF16 = torch.float16, torch.bfloat16


def low(*values: float, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def codes(event: OpEvent) -> list[str]:
    return [finding.code for finding in findings_of(rounded_constants, event)]


def examined(fn, dtype: torch.dtype) -> list[Finding]:  # type: ignore[no-untyped-def]
    with Examination(detectors=[rounded_constants]) as examination:
        examination.returned(fn(dtype))
    return examination.findings()


FIRES = {
    "add": ("HS401", lambda: event_of(ATEN.add.Tensor, low(0.0, 1.0), 1e-9)),
    "add_": ("HS401", lambda: event_of(ATEN.add_.Tensor, low(0.0, 1.0), 1e-9)),
    "a list": ("HS401", lambda: event_of(ATEN._foreach_add_.Scalar, [low(1.0), low(0.0)], 1e-9)),
    "a 0-d tensor": ("HS401", lambda: event_of(ATEN.add.Tensor, low(0.0), torch.tensor(1e-9))),
    "clamp_min": ("HS401", lambda: event_of(ATEN.clamp_min.default, low(0.0, 1.0), 1e-9)),
    "clamp": ("HS401", lambda: event_of(ATEN.clamp.default, low(-2.0, 1.0), 1e-9)),
    "maximum": ("HS401", lambda: event_of(ATEN.maximum.default, low(0.0), torch.tensor(1e-9))),
    "full": ("HS401", lambda: event_of(ATEN.full.default, [2], 1e-9, dtype=HALF)),
    "where": ("HS401", lambda: event_of(ATEN.where.ScalarOther, torch.tensor([False]), low(1.0), 1e-9)),
    "upper bound": ("HS402", lambda: event_of(ATEN.clamp.default, low(1.0, dtype=BF16), 1e-3, 0.999)),
    "lower bound": ("HS402", lambda: event_of(ATEN.clamp_min.default, low(0.5, dtype=BF16), 1.001)),
    "minus one": ("HS402", lambda: event_of(ATEN.hardtanh.default, low(-1.0, dtype=BF16), -0.999, 0.999)),
    "decay": ("HS402", lambda: event_of(ATEN.mul_.Tensor, low(1.0, 3.0, dtype=BF16), 0.999)),
    "decay by div": ("HS402", lambda: event_of(ATEN.div_.Tensor, low(1.0, 3.0, dtype=BF16), 1.001)),
    "refused": ("HS403", lambda: event_of(ATEN.masked_fill.Scalar, low(1.0), torch.tensor([True]), -1e8)),
    "refused whole": ("HS403", lambda: event_of(ATEN.masked_fill.Scalar, low(1.0), torch.tensor([True]), -(10**8))),
    "refused full": ("HS403", lambda: event_of(ATEN.full.default, [2], 1e6, dtype=HALF)),
    "overflows": ("HS403", lambda: event_of(ATEN.add.Tensor, low(0.0), 1e6)),
}


@pytest.mark.parametrize("case", FIRES)
def test_fires(case: str) -> None:
    code, event = FIRES[case]
    assert codes(event()) == [code]


QUIET = {
    "subnormal": lambda: event_of(ATEN.add.Tensor, low(0.0), 1e-7),
    "bf16 holds it": lambda: event_of(ATEN.add.Tensor, low(0.0, dtype=BF16), 1e-9),
    "fp32": lambda: event_of(ATEN.add.Tensor, torch.zeros(2), 1e-9),
    "fp32 result": lambda: event_of(ATEN.add.Tensor, torch.zeros(2), low(0.0)),
    "nothing to guard": lambda: event_of(ATEN.add.Tensor, low(0.5, 1.0), 1e-9),
    "nothing at the bound": lambda: event_of(ATEN.clamp_min.default, low(0.5, 1.0), 1e-9),
    "below the upper bound": lambda: event_of(ATEN.clamp.default, low(0.5, dtype=BF16), 1e-3, 0.999),
    "clamp at zero itself": lambda: event_of(ATEN.clamp_min.default, low(-1.0), 0.0),
    "clamp at one itself": lambda: event_of(ATEN.clamp.default, low(2.0, dtype=BF16), -1.0, 1.0),
    "decay that decays": lambda: event_of(ATEN.mul_.Tensor, low(1.0, 3.0, dtype=BF16), 0.99),
    "decay in fp16": lambda: event_of(ATEN.mul_.Tensor, low(1.0, 3.0), 0.999),
    "decay of zeros": lambda: event_of(ATEN.mul_.Tensor, low(0.0, dtype=BF16), 0.999),
    "out of place": lambda: event_of(ATEN.mul.Tensor, low(1.0, dtype=BF16), 0.999),
    "weight decay": lambda: event_of(ATEN.mul_.Tensor, low(1.0, dtype=BF16), 0.999, parameters=[0]),
    "tiny factor": lambda: event_of(ATEN.mul.Tensor, low(0.0, 1.0), 1e-9),
    "large factor": lambda: event_of(ATEN.mul.Tensor, low(0.0, 1e-4), 1e6),
    "mask": lambda: event_of(ATEN.masked_fill.Scalar, low(1.0), torch.tensor([True]), -torch.inf),
    "zero": lambda: event_of(ATEN.full.default, [2], 0.0, dtype=HALF),
    "comparison": lambda: event_of(ATEN.ge.Scalar, low(0.0), 1e-9),
    "power": lambda: event_of(ATEN.pow.Tensor_Scalar, low(2.0), 1e-9),
    "computed": lambda: event_of(
        ATEN.add.Tensor, low(0.0), torch.tensor(1e-9), made_by={1: Place("mean", file="train.py", line=1)}
    ),
    "eps of layer_norm": lambda: event_of(ATEN.native_layer_norm.default, low(0.0, 0.0), [2], None, None, 1e-12),
    "an upper bound above": lambda: event_of(ATEN.clamp.default, low(1.0, dtype=BF16), None, 1.001),
    "a lower bound below": lambda: event_of(ATEN.clamp_min.default, low(0.0), -1e-9),
    "no guard but a sum": lambda: event_of(ATEN.add.Tensor, low(0.0, dtype=BF16), 0.999),
    "fp64": lambda: event_of(ATEN.add.Tensor, torch.zeros(2, dtype=torch.float64), 1e-9),
    "inf in a normalization": lambda: event_of(
        ATEN.native_batch_norm.default, low(torch.inf, 1.0)[:, None], None, None, None, None, True, 0.1, 1e-12
    ),
    "other error of a constant": lambda: event_of(
        ATEN.where.ScalarOther, torch.tensor([True, False, True]), low(1.0, 2.0), -1e8
    ),
    "other error": lambda: event_of(ATEN.add.Tensor, low(1.0, 2.0), low(1.0, 2.0, 3.0)),
}


@pytest.mark.parametrize("case", QUIET)
def test_quiet(case: str) -> None:
    assert codes(QUIET[case]()) == []


def test_a_temporary_is_not_an_average() -> None:
    made = Place("mm", file="train.py", line=7)
    event = event_of(ATEN.mul_.Tensor, low(1.0, 3.0, dtype=BF16), 0.999, made_by={0: made})
    assert codes(event) == []


def test_numbers_of_a_list_belong_to_their_tensors() -> None:
    tensors = [low(0.0), low(0.0, 0.0, 2.0)]
    suspicions = list(rounded_constants(event_of(ATEN._foreach_add_.ScalarList, tensors, [1e-3, 1e-9])))
    assert [s.outputs for s in suspicions] == [(1,)]
    assert suspicions[0].finding.numbers["affected"] == 2


def test_a_mask_by_a_number_beyond_the_range_is_a_note() -> None:
    event = event_of(ATEN.where.ScalarOther, torch.tensor([True, False]), low(1.0, 2.0), -1e8)
    (finding,) = findings_of(rounded_constants, event)
    assert (finding.code, finding.severity) == ("HS403", Severity.NOTE)


def test_a_refusal_is_an_error() -> None:
    (finding,) = findings_of(rounded_constants, FIRES["refused"][1]())
    assert finding.severity == Severity.ERROR
    assert "-1e+08" in finding.what
    assert "65504" in finding.what


# ------------------------------------------------------------------ what reaches something


def test_a_guard_counts_where_a_logarithm_follows() -> None:
    assert [f.code for f in examined(lambda d: (torch.zeros(2, dtype=d) + 1e-9).log(), HALF)] == ["HS401"]
    assert examined(lambda d: (torch.zeros(2, dtype=d) + 1e-9).log(), BF16) == []
    # 1 and 0 instead of 1 + 1e-9 and 1e-9: nobody will ever see it.
    assert examined(lambda d: torch.tensor([1.0, 0.0], dtype=d) + 1e-9, HALF) == []


def test_normalizing_zeros() -> None:
    assert [f.code for f in examined(lambda d: F.normalize(torch.zeros(2, 3, dtype=d)), HALF)] == ["HS401"]
    assert examined(lambda d: F.normalize(torch.zeros(2, 3, dtype=d)), BF16) == []


NORMALIZATIONS = {
    "layer": lambda x, eps: F.layer_norm(x, (4,), eps=eps),
    "rms": lambda x, eps: F.rms_norm(x, (4,), eps=eps),
    "group": lambda x, eps: F.group_norm(x, 2, eps=eps),
    "batch": lambda x, eps: F.batch_norm(x, None, None, training=True, eps=eps),
    "batch, mixed": lambda x, eps: F.batch_norm(
        x, torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8), training=True, eps=eps
    ),
}


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("which", NORMALIZATIONS)
def test_an_eps_is_judged_by_what_comes_out(which: str, dtype: torch.dtype) -> None:
    """Most kernels use it in FP32, and 1e-12 holds in fp16; one does not. Whatever they do, only NaN is a finding."""
    results = []

    def normalized(d: torch.dtype) -> torch.Tensor:
        results.append(NORMALIZATIONS[which](torch.zeros(2, 8, 4, dtype=d), 1e-12))
        return results[0]

    findings = examined(normalized, dtype)
    assert [f.code for f in findings] == (["HS401"] if results[0].isnan().any() else [])


def test_the_eps_that_a_kernel_rounds() -> None:
    x = torch.zeros(2, 8, 4, dtype=HALF)
    if not NORMALIZATIONS["batch"](x, 1e-12).isnan().any():
        pytest.skip("this PyTorch's batch norm no longer rounds its eps to the input's format")
    assert [f.code for f in examined(lambda d: NORMALIZATIONS["batch"](x, 1e-12), HALF)] == ["HS401"]
    assert examined(lambda d: NORMALIZATIONS["batch"](x, 1e-5), HALF) == []
    nothing = torch.full((2, 8, 4), torch.inf, dtype=HALF)
    assert "HS401" not in [f.code for f in examined(lambda d: NORMALIZATIONS["batch"](nothing, 1e-12), HALF)]
