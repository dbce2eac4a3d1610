"""HS101 to HS106 and HS110: each fires with the right numbers, and keeps quiet on its near miss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import halfstep
from halfstep.doctor import Finding, examine

FP16, BF16 = torch.float16, torch.bfloat16


def found(program: Callable[[], object], *codes: str, policy: str | None = None) -> list[Finding]:
    """The findings of these codes; without codes, all."""
    return [finding for finding in examine(program, policy) if not codes or finding.code in codes]


def only(program: Callable[[], object], code: str, *, policy: str | None = None) -> Finding:
    findings = examine(program, policy)
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, "\n".join(map(str, findings)) or "nothing found"
    return matching[0]


def op_of(finding: Finding) -> str:
    assert finding.place is not None
    return finding.place.op


# ------------------------------------------------------------------ HS101: beyond the largest number


@settings(max_examples=30, deadline=None)
@given(exponents=st.lists(st.floats(-3, 12, allow_nan=False), min_size=1, max_size=20))
def test_overflow_is_counted_as_numpy_counts_it(exponents: list[float]) -> None:
    """Products of 16-bit numbers, computed in float64 and compared with where the format rounds to inf."""
    x = torch.tensor([2.0**e for e in exponents]).half()
    factor = 2.0**6
    exact = x.double().numpy() * factor
    info = torch.finfo(FP16)
    limit = info.max * (1 + info.eps / 4)  # half of the step beyond the largest number: ties go to inf
    beyond = np.abs(exact) >= limit
    findings = found(lambda: x * factor, "HS101")
    assert len(findings) == bool(beyond.any())
    if findings:
        assert findings[0].numbers["elements"] == int(beyond.sum()) and findings[0].numbers["of"] == x.numel()
        assert findings[0].numbers["fp32_amax"] == pytest.approx(float(np.abs(exact[beyond]).max()), rel=1e-6)
        assert findings[0].numbers["format_max"] == info.max


@pytest.mark.parametrize(("largest", "fires"), [(65519.0, False), (65519.99, False), (65520.0, True), (-65520.0, True)])
def test_the_limit_is_where_rounding_reaches_inf(largest: float, fires: bool) -> None:
    assert bool(found(lambda: torch.tensor([1.0, largest]).half(), "HS101")) is fires


def test_bf16_ends_a_little_below_fp32() -> None:
    finding = only(lambda: torch.tensor([3.4e38, 1.0]).bfloat16(), "HS101")
    assert "1.00 times bf16's largest number 3.38953e+38" in finding.what
    assert [f.code for f in found(lambda: torch.tensor([2.0**100]).bfloat16() * 2.0**28)] == ["HS102"]


def test_the_numbers_of_the_text() -> None:
    x = torch.tensor([300.0, 1.0, -400.0]).half()
    finding = only(lambda: x * x, "HS101")
    assert "2 of 3 results of mul are not finite in fp16" in finding.what
    assert "FP32 has 1.6e+05 there, 2.44 times fp16's largest number 65504 (largest inputs: 400, 400)" in finding.what
    assert "bf16" in finding.remedy


def test_the_sum_is_named_where_its_terms_fit() -> None:
    x = torch.full((300,), 30.0).half()
    exact = float(np.sum(x.double().numpy() ** 2))
    finding = only(lambda: x.pow(2).sum().sqrt(), "HS101")
    assert op_of(finding) == "sum" and finding.numbers["fp32_amax"] == exact
    assert f"{exact / 65504:.2f} times" in finding.what


def test_an_overflow_on_the_way_to_a_number_that_would_fit() -> None:
    """300 * 300 is beyond fp16, times 2**-10 it is 87.9 again: the kernel multiplies in fp16."""
    x = torch.tensor([300.0, 300.0, 2.0**-10]).half()
    finding = only(lambda: x.prod(), "HS101")
    assert "FP32 has 87.891, which fp16 could hold: it overflows on the way there" in finding.what


def test_in_place_and_list_ops_are_named() -> None:
    def in_place() -> Tensor:
        return torch.tensor([300.0, 2.0]).half().mul_(300)

    def into_a_slice() -> Tensor:
        x = torch.ones(2, 3).half()
        x[1].mul_(70000.0 / 2).mul_(3)
        return x

    def listed() -> list[Tensor]:
        xs = [torch.ones(2).half(), torch.full((3,), 300.0).half()]
        torch._foreach_mul_(xs, 300.0)
        return xs

    for program, op, elements in ((in_place, "mul_", 1), (into_a_slice, "mul_", 3), (listed, "_foreach_mul_", 3)):
        finding = only(program, "HS101")
        assert (op_of(finding), finding.numbers["elements"]) == (op, elements)


def test_what_was_there_before_in_place_is_what_the_text_speaks_of() -> None:
    finding = only(lambda: torch.tensor([400.0]).half().pow_(2), "HS101")
    assert finding.numbers["fp32_amax"] == 160000 and "largest inputs: 400)" in finding.what


def test_out_of_range_in_the_optimizer() -> None:
    """Adam squares gradients: 300 is beyond what fp16 moments hold."""
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = torch.optim.Adam([weight], lr=1e-3, foreach=False, eps=1e-4, betas=(0.9, 0.0))
    weight.grad = torch.full((4,), 300.0).half()
    finding = only(optimizer.step, "HS101")
    assert finding.place is not None and finding.place.phase == "optimizer"
    assert "FP32 masters" in finding.remedy


def test_the_op_is_named_and_not_the_cast_that_rounds_it() -> None:
    """Emulated formats compute in FP32 and round afterwards: `_to_copy` is where inf appears."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, 150.0)
    finding = only(lambda: model(torch.full((2, 4), 150.0)), "HS101", policy="fp16-mixed:emulate")
    assert op_of(finding) == "mm" and finding.numbers["fp32_amax"] == 90000


def test_a_cast_on_a_line_of_its_own_is_the_op() -> None:
    def program() -> Tensor:
        x = torch.tensor([300.0]) * 300
        return x.half()

    assert op_of(only(program, "HS101")) == "_to_copy"


def test_a_gradient_that_overflows_is_named_in_the_backward_pass() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), 1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight.half() * x).float() * 60000.0

    model = Steep()
    finding = only(lambda: model(torch.tensor([4.0]).half()).sum().backward(), "HS101")
    assert finding.place is not None
    assert (finding.place.op, finding.place.phase, finding.place.module_type) == ("mul", "backward", "Steep")
    assert finding.numbers["fp32_amax"] == pytest.approx(240000, rel=1e-3) and "a lower loss scale" in finding.remedy


@pytest.mark.parametrize("channel", [0, 5])
def test_a_channel_that_all_share_is_named(channel: int) -> None:
    weight = torch.ones(6, 8)
    weight[channel] = 20000.0
    x = torch.ones(3, 8)
    finding = only(lambda: functional.linear(x.half(), weight.half()), "HS101")
    assert f"all in channel {channel}:" in finding.what and finding.numbers["elements"] == 3


def test_no_channel_is_named_where_there_are_several() -> None:
    finding = only(lambda: functional.linear(torch.ones(3, 8).half(), torch.full((6, 8), 20000.0).half()), "HS101")
    assert "channel" not in finding.what


def test_the_first_op_is_named_and_not_those_it_infects() -> None:
    def program() -> Tensor:
        x = torch.tensor([300.0, 1.0]).half()
        y = x * x
        return (y - y.amax()).exp()

    assert [(f.code, op_of(f)) for f in found(program)] == [("HS101", "mul")]


QUIET_OVERFLOW: dict[str, Callable[[], object]] = {
    "just below": lambda: torch.tensor([255.9]).half() ** 2 * 0.999,
    "bf16 has the range": lambda: torch.tensor([1e30]).bfloat16() * 1e8,
    "mask": lambda: (torch.randn(3, 4).half() + torch.tensor([0.0, 0.0, 0.0, -torch.inf]).half()).softmax(-1),
    "mask made by masked_fill": lambda: torch.randn(3, 4).half().tril().masked_fill(torch.eye(3, 4) > 0, -torch.inf),
    "uninitialised": lambda: torch.empty(100, dtype=FP16).zero_(),
    "inf on purpose": lambda: torch.full((3,), torch.inf, dtype=FP16).minimum(torch.ones(3).half()),
    "a branch that is thrown away": lambda: (lambda x: torch.where(x > 200, x, x * x))(
        torch.tensor([300.0, 2.0]).half()
    ),
    "the exponential's tail": lambda: torch.linspace(-40, 0, 50).half().exp(),
    "an inf that sigmoid takes": lambda: torch.sigmoid(torch.tensor([300.0, 1.0]).half() ** 2),
    "attention with a mask": lambda: functional.scaled_dot_product_attention(
        *(torch.randn(1, 2, 4, 8).half() for _ in range(3)), attn_mask=torch.ones(4, 4).tril().bool()
    ),
    "empty": lambda: (torch.empty(0).half() * 2).sum(),
}


@pytest.mark.parametrize("what", QUIET_OVERFLOW)
def test_no_overflow(what: str) -> None:
    assert [str(f) for f in found(QUIET_OVERFLOW[what]) if f.code.startswith("HS1")] == []


# ------------------------------------------------------------------ HS102: not the format's doing


def test_what_fp32_does_too() -> None:
    x = torch.tensor([4.0, 0.0, 0.0, -1.0])
    finding = only(lambda: x.log(), "HS102")
    assert (
        "3 of 4 results of log are inf or NaN from finite inputs, in FP32 too; its inputs hold 2 zeros" in finding.what
    )
    finding = only(lambda: x.half().log(), "HS102")
    assert finding.numbers["elements"] == 3
    assert found(lambda: x.clamp_min(1e-3).log()) == []


def test_the_slope_of_a_root_at_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    finding = only(lambda: model(torch.ones(1, 2)).square().sum().sqrt().backward(), "HS102")
    assert finding.place is not None and finding.place.phase == "backward" and op_of(finding) in ("div", "mul")


# ------------------------------------------------------------------ HS103: an overflow that looks healthy


def test_an_overflow_becomes_zero() -> None:
    x = torch.tensor([[300.0, 1.0], [1.0, 1.0]]).half()

    def program() -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))

    finding = only(program, "HS103")
    exact = float((x.double() ** 2).mean(-1)[0])
    assert op_of(finding) == "rsqrt"
    assert finding.numbers["fp32_amax"] == pytest.approx(exact, rel=1e-3)
    assert finding.numbers["error"] == pytest.approx(exact**-0.5, rel=1e-3)
    assert "HS101" in [f.code for f in found(program)]  # and what made it


@pytest.mark.parametrize(
    "program",
    [
        lambda x: torch.sigmoid(x * x),  # 1 in FP32 too
        lambda x: (x * x).clamp(max=100.0),
        lambda x: (x * x).nan_to_num(posinf=1000.0),
        lambda x: (x * x).isinf().any(),
        lambda x: torch.rsqrt((x * 0.5).pow(2)),  # 150 squared fits
    ],
)
def test_a_healthy_number_from_an_overflow(program: Callable[[Tensor], object]) -> None:
    assert found(lambda: program(torch.tensor([300.0, 1.0]).half()), "HS103") == []


# ------------------------------------------------------------------ HS104: rows of nothing but -inf


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16])
@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
def test_rows_of_nothing_but_minus_inf(dtype: torch.dtype, softmax: Callable[..., Tensor]) -> None:
    scores = torch.zeros(2, 5, 4, dtype=dtype)
    scores[0, 1] = scores[1, 0] = scores[1, 4] = -torch.inf
    scores[0, 3, 1:] = -torch.inf  # one is left
    finding = only(lambda: softmax(scores, -1), "HS104")
    assert (finding.numbers["rows"], finding.numbers["of"]) == (3, 10) and "3 of 10 rows" in finding.what
    assert "HS110" not in [f.code for f in found(lambda: softmax(scores, -1))]


def test_the_row_is_along_the_softmax() -> None:
    scores = torch.zeros(4, 5)
    scores[:, 2] = -torch.inf
    assert found(lambda: scores.softmax(-1)) == []
    finding = only(lambda: scores.softmax(0), "HS104")
    assert (finding.numbers["rows"], finding.numbers["of"]) == (1, 5)


def test_a_row_that_nothing_attends_from_is_not_reported() -> None:
    scores = torch.zeros(3, 4)
    scores[1] = -torch.inf
    used = torch.tensor([True, False, True])[:, None]
    assert found(lambda: torch.where(used, scores.softmax(-1), 0.0)) == []


# ------------------------------------------------------------------ HS105: a zero that rounding made


def test_the_logarithm_of_a_zero_that_rounding_made() -> None:
    p = torch.tensor([1e-9, 0.5])
    finding = only(lambda: p.half().log(), "HS105")
    assert op_of(finding) == "log" and finding.numbers["elements"] == 1
    assert finding.numbers["fp32_input"] == pytest.approx(1e-9) and "made by _to_copy" in finding.what
    assert finding.numbers["fp32_result"] == pytest.approx(math.log(1e-9) * -1, rel=1e-4)
    assert found(lambda: p.bfloat16().log()) == [] == found(lambda: p.clamp_min(1e-7).half().log())


def test_division_by_a_zero_that_rounding_made() -> None:
    def program() -> Tensor:
        x = torch.tensor([1e-4, 1.0]).half()
        return 1.0 / (x * x)

    assert (op_of(only(program, "HS105")), found(program, "HS102")) == ("reciprocal", [])


# ------------------------------------------------------------------ HS106: flush to zero


@settings(max_examples=30, deadline=None)
@given(scale=st.integers(-30, -8), seed=st.integers(0, 100), dtype=st.sampled_from([FP16, BF16]))
def test_flushed_results_are_counted_as_numpy_counts_them(scale: int, seed: int, dtype: torch.dtype) -> None:
    extra = 0 if dtype == FP16 else -109
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)).to(dtype)
    factor = 2.0 ** (scale + extra)
    exact = x.double().numpy() * factor
    info = torch.finfo(dtype)
    zero = (exact != 0) & (np.abs(exact) <= info.tiny * info.eps / 2)  # half the smallest: ties go to zero
    kept = np.abs(exact) >= 2.0**-126  # float32 on this machine may keep subnormals or not: only where it is no matter
    findings = found(lambda: x * factor, "HS106")
    nonzero = int((exact != 0).sum())
    if dtype == FP16 or bool(kept[exact != 0].all()):
        assert len(findings) == (int(zero.sum()) >= 0.5 * nonzero)
        if findings:
            assert (findings[0].numbers["zero"], findings[0].numbers["nonzero_in_fp32"]) == (int(zero.sum()), nonzero)
            assert findings[0].numbers["fp32_amax"] == pytest.approx(float(exact.max()), rel=1e-6)


@pytest.mark.parametrize(("small", "fires"), [(4, False), (6, True), (10, True)])
def test_half_of_the_results_have_to_flush(small: int, fires: bool) -> None:
    x = torch.cat([torch.full((small,), 1e-5), torch.full((10 - small,), 2e-2)]).half()
    assert [f.numbers["zero"] for f in found(lambda: (x * 1e-5)[:small], "HS106")] == ([small] if fires else [])


def test_the_op_that_flushes_is_named_once() -> None:
    x = torch.full((10,), 1e-5).half()

    def program() -> tuple[Tensor, Tensor]:
        y = x * x
        return (y * 3).exp(), y * 1e6

    finding = only(program, "HS106")
    assert (
        op_of(finding) == "mul" and "10 of 10 results of mul are zero in fp16; in FP32 they reach 1e-10" in finding.what
    )


QUIET_FLUSH: dict[str, Callable[[], object]] = {
    "subnormal but there": lambda: torch.full((10,), 1e-3).half() * 1e-4,
    "less than half": lambda: torch.cat([torch.full((4,), 1e-5), torch.ones(6)]).half() * 1e-5,
    "zero in FP32 too": lambda: torch.zeros(10).half() * 1e-5,
    "tail of a softmax": lambda: (torch.arange(20.0).half() * 3).softmax(-1) * 1,
    "tail of a sigmoid": lambda: torch.sigmoid(torch.full((10,), -30.0).half()) + 1,
    "cancelled": lambda: (lambda x: (x + 1e-4) - x)(torch.ones(10).half()),
    "cancelled in a sum": lambda: (torch.ones(10).half() + 1e-4) + -torch.ones(10).half(),
    "dropped": lambda: functional.dropout(torch.ones(100).half(), 0.9),
    "rectified": lambda: torch.relu(torch.full((10,), -1.0).half()),
    "never used": lambda: (torch.full((10,), 1e-5).half() * 1e-5, torch.ones(1))[1],
    "added to what is large": lambda: torch.ones(10).half() + (torch.full((10,), 1e-5).half() * 1e-5),
    "bf16 has the range": lambda: torch.full((10,), 1e-5).bfloat16() * 1e-20,
}


@pytest.mark.parametrize("what", QUIET_FLUSH)
def test_no_flush(what: str) -> None:
    assert [str(f) for f in found(QUIET_FLUSH[what], "HS106")] == []


# ------------------------------------------------------------------ HS110: the data


def test_bad_data_is_told_once_and_blamed_on_nothing_else() -> None:
    x = torch.randn(4, 8)
    x[1, 2], x[3, 3], x[0, 0] = torch.nan, torch.nan, torch.inf
    model = nn.Linear(8, 4)

    def program() -> None:
        for _ in range(2):
            model(x).sum().backward()

    findings = found(program, policy="bf16-mixed")
    assert [f.code for f in findings] == ["HS110"]
    assert (findings[0].numbers["nan"], findings[0].numbers["inf"], findings[0].numbers["elements"]) == (2, 1, 32)
    assert "shape (4, 8)" in findings[0].what and "2 NaN and 1 inf" in findings[0].what


def test_a_broken_parameter_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    finding = only(lambda: model(torch.ones(1, 4)), "HS110")
    assert "the parameter 1.bias holds 1 NaN among 2 numbers" in finding.what and "checkpoint" in finding.remedy


def test_data_that_are_masked_out_are_not_reported() -> None:
    x = torch.tensor([1.0, torch.nan, 3.0])
    assert found(lambda: torch.where(x.isnan(), 0.0, x).sum()) == []
    assert found(lambda: x.nan_to_num().sum()) == []
    assert found(lambda: torch.tensor([0.0, -torch.inf]) + 1) == []


def test_a_model_under_a_policy_is_named_by_its_modules() -> None:
    """The first layer's weight is what overflows; the policy's casts and later layers are not named."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed:emulate")

    def program() -> None:
        with mp.autocast():
            loss = model(torch.full((2, 8), 100.0)).float().mean()
        mp.backward(loss)
        mp.step()

    findings = found(program, "HS101")
    assert [(f.place.module, f.place.op, f.place.phase) for f in findings if f.place] == [("0", "addmm", "forward")]
