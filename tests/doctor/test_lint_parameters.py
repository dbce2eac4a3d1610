"""HS304, HS505, HS306, HS309: what fires, and the near miss beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.doctor.lints.parameters import smallest_unmoved, unmoved_significands
from halfstep.formats import of, round_to


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)).to(dtype)


def of_code(code: str, module: nn.Module, optimizer: Any, **options: Any) -> list[Finding]:
    return [finding for finding in lint(module, optimizer, **{"policy": None, **options}) if finding.code == code]


class OwnOptimizer(torch.optim.Optimizer):
    """A hand-written one; ``copies`` keeps FP32 masters in its state, under a name that says nothing."""

    def __init__(self, params: Any, lr: float = 0.1, copies: bool = False, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})
        self.copies = copies

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["n"] = 0
                    if self.copies:
                        state["truth"] = p.detach().float().clone()
                state["n"] += 1
                truth = state["truth"] if self.copies else p.float()
                truth -= group["lr"] * p.grad.float()
                p.copy_(truth)


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.01
    optimizer.step()
    return optimizer


# ------------------------------------------------------------------ HS304


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Muon])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_without_masters(optimizer: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> None:
    module = nn.Linear(8, 8, bias=False).to(dtype)
    (found,) = of_code("HS304", module, optimizer(module.parameters(), lr=0.1))
    assert found.severity == Severity.WARNING
    assert found.numbers == {"parameters": 1, "of_parameters": 1, "elements": 64, "format": str(of(dtype))}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: halfstep.MasterWeights(torch.optim.AdamW(p)),
        lambda p: halfstep.optim.AdamW(p),
        lambda p: halfstep.optim.SGD(p, lr=0.1, master="24bit"),
        lambda p: halfstep.optim.AdamW(p, master="none"),
        lambda p: halfstep.optim.AdamW(p, master="none", rounding="kahan"),
        lambda p: OwnOptimizer(p, stochastic_rounding=True),
        lambda p: OwnOptimizer(p, kahan_sum=None),
    ],
)
def test_what_remembers_an_update_is_fine(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    module = net()
    made = optimizer(list(module.parameters()))
    assert of_code("HS304", module, made) == []
    assert of_code("HS304", module, stepped(module, made)) == []


def test_no_master_and_rounding_to_nearest_is_not_fine_in_our_own_either() -> None:
    module = net()
    optimizer = halfstep.optim.AdamW(module.parameters(), master="none", rounding="nearest")
    (found,) = of_code("HS304", module, optimizer)
    assert found.severity == Severity.WARNING and found.numbers["parameters"] == 6


def test_a_foreign_optimizer_is_judged_by_what_it_holds() -> None:
    for copies, options, before, after in (
        (False, {}, [Severity.NOTE], [Severity.WARNING]),  # it might make masters in its first step; it did not
        (False, {"stochastic_rounding": False}, [Severity.NOTE], [Severity.WARNING]),
        (True, {}, [Severity.NOTE], []),
    ):
        module = net()
        optimizer = OwnOptimizer(module.parameters(), copies=copies, **options)
        assert [f.severity for f in of_code("HS304", module, optimizer)] == before
        assert [f.severity for f in of_code("HS304", module, stepped(module, optimizer))] == after


def test_a_wrapper_is_looked_through() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True)
    module = net()
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    try:
        (found,) = of_code("HS304", module, [accelerator.prepare(inner), inner])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found.what.startswith("all 6 trainable parameters") and "SGD" in found.what


def test_only_trained_16_bit_parameters_count() -> None:
    module = net()
    module[1].float()
    module[0].weight.requires_grad_(False)
    (found,) = of_code("HS304", module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert found.what.startswith("3 of 5 trainable parameters")
    assert found.place is not None and found.place.parameter == "0.bias"
    assert of_code("HS304", net(torch.float32), torch.optim.SGD(net(torch.float32).parameters(), lr=0.1)) == []


# ------------------------------------------------------------------ HS505


def tiny_bert(folder: Path, dtype: torch.dtype) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).to(dtype).save_pretrained(folder)
    return folder


def test_transformers_model_in_its_checkpoints_format(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    module = BertForSequenceClassification.from_pretrained(tiny_bert(tmp_path, torch.bfloat16))
    assert next(module.parameters()).dtype is torch.bfloat16  # what the default is today
    wrapped = nn.ModuleDict({"model": module})
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5)
    found = lint(wrapped, optimizer, policy=None)
    (sharper,) = [f for f in found if f.code == "HS505"]
    assert sharper.severity == Severity.WARNING and sharper.place is not None and sharper.place.module == "model"
    assert f"all {len(list(module.parameters()))} trainable parameters" in sharper.what
    assert "HS304" not in [f.code for f in found]
    # The learning rate of fine-tuning against weights of the usual size.
    (lost,) = [f for f in found if f.code == "HS306"]
    assert lost.severity == Severity.ERROR and float(lost.numbers["share"]) > 0.7


def test_transformers_model_that_was_loaded_or_stepped_with_care(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    folder = tiny_bert(tmp_path, torch.bfloat16)
    wide = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert lint(wide, torch.optim.AdamW(wide.parameters(), lr=1e-5), policy=None) == []
    low = BertForSequenceClassification.from_pretrained(folder)
    assert lint(low, halfstep.optim.AdamW(low.parameters(), lr=1e-5), policy=None) == []
    low.requires_grad_(False)
    assert lint(low, torch.optim.AdamW(nn.Linear(2, 2).parameters()), policy=None) == []


def test_a_model_put_into_16_bits_by_hand_is_no_checkpoints(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    module = BertForSequenceClassification.from_pretrained(tiny_bert(tmp_path, torch.float32)).bfloat16()
    found = [f.code for f in lint(module, torch.optim.AdamW(module.parameters()), policy=None)]
    assert "HS304" in found and "HS505" not in found


def test_a_declared_dtype_in_its_older_spelling_and_an_optimizer_that_is_not_known() -> None:
    module = net()
    module.config = SimpleNamespace(torch_dtype="bfloat16")  # type: ignore[assignment]
    assert len(of_code("HS505", module, torch.optim.SGD(module.parameters(), lr=0.1))) == 1
    unknown = OwnOptimizer(module.parameters())
    assert of_code("HS505", module, unknown) == []
    assert [f.severity for f in of_code("HS304", module, unknown)] == [Severity.NOTE]


# ------------------------------------------------------------------ HS306


@pytest.mark.parametrize("name", ["fp16", "bf16", "float8_e4m3fn"])
def test_smallest_unmoved_against_rounding(name: str) -> None:
    format = of(name)
    for exponent in (*range(-28, 3, 3), -60, -140):
        for update in (2.0**exponent, 1.3 * 2.0**exponent):
            limit = smallest_unmoved(update, format)
            for k in range(format.emin - format.mantissa_bits, format.emax):
                weight = torch.tensor([2.0**k, 1.5 * 2.0**k], dtype=torch.float64)
                weight = round_to(weight, format)
                # Upwards: below a power of two numbers lie twice as dense. A tie may go either way.
                moves = round_to(weight + update, format) != weight
                tie = update == float(format.ulp(2.0**k)) / 2
                assert tie or (moves == (weight < limit)).all(), (update, k)


def adam_oracle(weights: Tensor, lr: float) -> float:
    """The share of weights that one step of Adam with gradients of one size leaves where they are, made by Adam."""
    moved = []
    for sign in (1.0, -1.0):
        parameter = nn.Parameter(weights.clone())
        parameter.grad = torch.full_like(parameter, sign)
        torch.optim.Adam([parameter], lr=lr, fused=True).step()
        moved.append(parameter.detach() != weights)
    return 1 - float((moved[0] & moved[1]).double().mean())


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-4), (torch.bfloat16, 1e-5), (torch.float16, 3e-6)])
def test_share_of_weights_below_the_learning_rate(dtype: torch.dtype, lr: float) -> None:
    torch.manual_seed(1)
    module = nn.Linear(512, 256, bias=False).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(256, 512) * 0.02)
    (found,) = of_code("HS306", module, torch.optim.Adam(module.parameters(), lr=lr))
    assert float(found.numbers["share"]) == pytest.approx(adam_oracle(module.weight.detach(), lr), abs=0.02)
    assert found.severity == (Severity.ERROR if float(found.numbers["share"]) >= 0.5 else Severity.WARNING)


def test_a_learning_rate_that_moves_all_weights_is_fine() -> None:
    module = nn.Linear(512, 256, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.randn(256, 512) * 0.02)
    assert of_code("HS306", module, torch.optim.Adam(module.parameters(), lr=1e-2)) == []
    assert of_code("HS306", module, halfstep.optim.AdamW(module.parameters(), lr=1e-6)) == []
    module.float()
    assert of_code("HS306", module, torch.optim.Adam(module.parameters(), lr=1e-6)) == []


def test_a_schedules_base_is_what_counts() -> None:
    module = nn.Linear(512, 256, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.randn(256, 512) * 0.02)
    for base, count in ((1e-2, 0), (1e-5, 1)):
        optimizer = torch.optim.Adam(module.parameters(), lr=base)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
        assert optimizer.param_groups[0]["lr"] == 0
        assert len(of_code("HS306", module, optimizer)) == count


def test_of_large_parameters_some_weights_are_looked_at() -> None:
    module = nn.Linear(2048, 2048, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.zero_()
        module.weight[:512] = 1.0
    (found,) = of_code("HS306", module, torch.optim.Adam(module.parameters(), lr=1e-5))
    assert (found.numbers["share"], found.numbers["weights"]) == (0.25, 2**20)


def test_sgd_is_judged_by_gradients_only() -> None:
    module = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    assert of_code("HS306", module, optimizer) == []  # nothing is known before the first backward pass
    module.weight.grad = torch.full_like(module.weight, 2.0**-9)  # ulp(1) is 2^-7
    module.weight.grad[:16] = 2.0**-6
    module.weight.grad[16:32] = 0
    (found,) = of_code("HS306", module, optimizer)
    assert found.numbers["share"] == pytest.approx(32 / 48)
    assert of_code("HS306", module, torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)) == []
    module.weight.grad.fill_(2.0**-6)
    assert of_code("HS306", module, optimizer) == []


# ------------------------------------------------------------------ HS309


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_unmoved_significands_against_torch(name: str) -> None:
    format = of(name)
    assert format.dtype is not None
    codes = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(format.dtype)
    normal = codes[(codes.float() >= format.tiny * 4) & codes.isfinite()]
    normal = normal[: normal.numel() // 2**format.mantissa_bits * 2**format.mantissa_bits]
    for factor in (0.9, 0.98, 0.995, 0.997, 0.999, 0.9995, 0.9999, 1 - 1e-6):
        same = float((normal.clone().mul_(factor) == normal).double().mean())
        assert unmoved_significands(factor, format) == pytest.approx(same, abs=1e-12), factor


# 1e-4 of a weight, where bf16's spacing is 1/256 to 1/128 of it; and 1 % of it.
@pytest.mark.parametrize(("lr", "decay", "fires"), [(1e-3, 0.1, True), (1e-1, 0.1, False), (1e-3, 0.0, False)])
def test_weight_decay_that_rounds_away(lr: float, decay: float, fires: bool) -> None:
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=decay)
    found = of_code("HS309", module, optimizer)
    assert len(found) == fires
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert moved == (not fires and decay > 0)
    if fires:
        assert found[0].numbers["share"] == 1 and "not decayed" in found[0].consequence


def test_decay_that_is_not_applied_by_itself_is_fine() -> None:
    module = net()
    for optimizer in (
        torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1, fused=True),  # rounded with the update
        torch.optim.Adam(module.parameters(), lr=1e-3, weight_decay=0.1),  # part of the gradient
        halfstep.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1),
    ):
        assert of_code("HS309", module, optimizer) == []
    wide = net(torch.float32)
    assert of_code("HS309", wide, torch.optim.AdamW(wide.parameters(), lr=1e-3, weight_decay=0.1)) == []
    assert math.isclose(unmoved_significands(1 - 1e-4, of("fp32")), 0.0)
