"""HS310, HS409: what fires, and the near miss beside it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.doctor.lints.buffers import phase_error, ramp_collisions
from halfstep.formats import of

LOW = [torch.float16, torch.bfloat16]


def of_code(code: str, modules: Any, optimizer: Any = (), **options: Any) -> list[Finding]:
    return [finding for finding in lint(modules, optimizer, **{"policy": None, **options}) if finding.code == code]


class Holding(nn.Module):
    """A module with one buffer and a parameter."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("constant", buffer)


# ------------------------------------------------------------------ HS310


def norm(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)).to(dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_running_statistics_in_16_bits(dtype: torch.dtype) -> None:
    module = norm(dtype)
    (found,) = of_code("HS310", module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert found.severity == Severity.WARNING and found.place is not None
    assert (found.place.module, found.numbers["modules"]) == ("1", 2)
    # Where the running mean comes to rest below a constant mean, in torch's own arithmetic.
    layer = nn.BatchNorm1d(1).to(dtype)
    assert layer.running_mean is not None
    for _ in range(200):
        layer(torch.full((4, 1), 1.99, dtype=dtype))
    gap = 1 - float(layer.running_mean) / 1.99
    # The kernel rounds the products as well, on the CPU.
    assert 0.25 * float(found.numbers["share"]) < gap < 2 * float(found.numbers["share"])


def test_running_statistics_that_are_wide_or_do_not_move_are_fine() -> None:
    module = norm(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module[1].float()
    assert of_code("HS310", module, optimizer)[0].numbers["modules"] == 1
    module[3].float()
    assert of_code("HS310", module, optimizer) == []
    frozen = norm(torch.bfloat16).eval()
    assert of_code("HS310", frozen, torch.optim.SGD(frozen.parameters(), lr=0.1)) == []
    assert of_code("HS310", norm(torch.bfloat16)) == []  # inference


def test_averaged_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = AveragedModel(copy.deepcopy(model).bfloat16(), multi_avg_fn=get_ema_multi_avg_fn(0.999))
    (found,) = of_code("HS310", [model, average], optimizer)
    assert found.severity == Severity.WARNING and "all 4 parameters" in found.what
    assert of_code("HS310", [model, AveragedModel(model)], optimizer) == []


def test_a_16_bit_copy_without_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teacher = copy.deepcopy(model).half().requires_grad_(False)
    (found,) = of_code("HS310", [model, teacher], optimizer)
    assert found.severity == Severity.NOTE  # a fixed reference looks the same
    assert of_code("HS310", [model, copy.deepcopy(teacher).float()], optimizer) == []
    other = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).half().requires_grad_(False)
    assert of_code("HS310", [model, other], optimizer) == []  # alike, but of other values: a frozen part
    assert of_code("HS310", [model, teacher]) == []


# ------------------------------------------------------------------ HS409


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("count", [256, 1024, 4096])
def test_positions(dtype: torch.dtype, count: int) -> None:
    ramp = torch.arange(count).to(dtype)
    equal = count - ramp.unique().numel()  # fp16 holds whole numbers up to 2048, bf16 up to 256
    for buffer in (ramp, ramp.flip(0), ramp[None], ramp * 0.5):
        found = of_code("HS409", Holding(buffer))
        assert [f.numbers["collisions"] for f in found] == ([equal] if equal else [])
        if found:
            assert found[0].severity == Severity.WARNING and found[0].place is not None
            assert found[0].place.parameter == "constant"


def test_positions_in_fp32_or_integers_are_fine() -> None:
    for buffer in (torch.arange(4096.0), torch.arange(4096), torch.arange(4096, dtype=torch.int16)):
        assert of_code("HS409", Holding(buffer)) == []


@pytest.mark.parametrize("dtype", LOW)
def test_frequencies(dtype: torch.dtype) -> None:
    tightness = []
    for size, base in ((64, 10000.0), (128, 5e5), (16, 100.0), (32, 1e6), (96, 1e4)):
        exact = 1 / base ** (torch.arange(0, size, 2).double() / size)
        (found,) = of_code("HS409", Holding(exact.float().to(dtype)))
        worst = float((exact.to(dtype).double() - exact).abs().max())
        bound = float(found.numbers["phase_error"]) / 4096
        assert worst <= bound
        tightness.append(worst / bound)
        assert float(found.numbers["position"]) == pytest.approx(1 / bound)
        assert of_code("HS409", Holding(exact.float())) == []
    assert max(tightness) > 0.75


def test_powers_of_two_are_exact() -> None:
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(8)], dtype=torch.bfloat16)
    assert of_code("HS409", Holding(slopes)) == []


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "values",
    [
        torch.ones(512),
        torch.linspace(0, 1, 9),  # a ramp, but all values differ
        torch.arange(4096.0).sqrt(),  # collides, but is no ramp
        torch.tensor([4.0, 2.0, 1.9, 0.1, 0.01]),  # falls, but is no series
        torch.linspace(1, 0.1, 12),  # falls, a ramp, no series
        torch.randn(64, generator=torch.Generator().manual_seed(0)).sort().values,
        torch.arange(4096.0).reshape(64, 64),
        torch.tensor([1.0, math.nan] * 8),
        torch.zeros(0),
        torch.tensor(3.0),
    ],
)
def test_other_buffers_are_fine(dtype: torch.dtype, values: Tensor) -> None:
    assert of_code("HS409", Holding(values.to(dtype))) == []


def test_like_buffers_are_one_finding() -> None:
    layers = nn.ModuleList(Holding(torch.arange(512).bfloat16()) for _ in range(6))
    (found,) = of_code("HS409", layers)
    assert found.numbers["buffers"] == 6 and "5 more like it" in found.what


def test_a_real_models_frequencies_after_a_cast() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    assert of_code("HS409", model) == []
    (found,) = of_code("HS409", model.bfloat16())
    assert found.place is not None and "rotary" in found.place.module


def test_the_measures_by_themselves() -> None:
    bf16 = of("bf16")
    assert ramp_collisions(torch.arange(300.0).bfloat16().double(), bf16) == 300 - (256 + 23)  # 256, 258, …, 300
    assert ramp_collisions(torch.arange(256.0).double(), bf16) == 0
    # ulp of a frequency in [0.5, 1) is 2^-8.
    assert phase_error((0.9 ** torch.arange(8.0)).bfloat16().double(), bf16) == 2.0**-9
