"""Scripts that step with an optimizer of `halfstep.optim`, which has its masters itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = """
import sys
import torch
from torch import nn
from halfstep import optim

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
first = [p.detach().clone() for p in model.parameters()]
options = {"release_gradients": True} if "release" in sys.argv else {}
if "torch" in sys.argv:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
else:
    # The kernels have the bits of PyTorch's fused form, which is what parameters in planes are stepped by.
    backend = "auto" if "planes" in sys.argv else "eager"
    optimizer = optim.AdamW(model.parameters(), 1e-2, backend=backend, **options)
if "own16" in sys.argv:
    model.to(torch.bfloat16)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
losses, dtypes = [], []
for step in range(6):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
    if "cast" in sys.argv:
        x = x.to(torch.bfloat16)
    if "overflow" in sys.argv and step == 3:
        x = x * 1e6
    if step == 0:
        output = model(x)
        starts = [optimizer.master(p) for p in model.parameters()] if "torch" not in sys.argv else first
    output = model(x)
    dtypes.append(str(model[0].weight.dtype))
    loss = nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0, 1, 2]))
    loss.backward()
    if "clip" in sys.argv:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    losses.append(loss.item())
saved = optimizer.state_dict()
torch.save(
    {
        "losses": losses,
        "dtypes": dtypes,
        "start is exact": all(torch.equal(a, b) for a, b in zip(starts, first)),
        "model": model.state_dict(),
        "state": saved["state"],
        "rate": scheduler.get_last_lr(),
    },
    "out.pt",
)
"""


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master", "fp16-master"])
def test_the_run_is_that_of_the_torch_optimizer(launch: Callable[..., Any], policy: str) -> None:
    arguments = (
        "clip",
        *(["overflow"] if policy.startswith("fp16") else []),
        *(["planes"] if "master" in policy else []),
    )
    ours, torchs = launch(SCRIPT, policy, *arguments), launch(SCRIPT, policy, *arguments, "torch")
    for ran in (ours, torchs):
        assert (ran.run.outcome, ran.run.steps, ran.run.skipped) == ("finished", 6, int(policy.startswith("fp16")))
        assert ran.codes == set()
    assert repr(ours.out["losses"]) == repr(torchs.out["losses"])
    assert equal(ours.out["model"], torchs.out["model"])
    assert ours.out["rate"] == torchs.out["rate"]
    assert ours.out["start is exact"]
    assert set(ours.out["dtypes"]) == {"torch.float32"}
    assert {frozenset(state) for state in ours.out["state"].values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}
    assert [s.grad_norm for s in ours.record.steps] == pytest.approx(
        [s.grad_norm for s in torchs.record.steps], rel=1e-6, nan_ok=True
    )


def test_16_bit_parameters_of_its_own_are_no_loss(launch: Callable[..., Any]) -> None:
    alone = launch(SCRIPT, "bf16-mixed", "own16", "cast")  # the policy stands back: inputs have to be bf16
    assert (alone.run.outcome, alone.codes) == ("finished", set())
    assert launch(SCRIPT, "bf16-mixed", "own16", "cast", "torch").codes == {"own-16-bit-parameters"}
    under = launch(SCRIPT, "bf16-master", "own16")  # the policy's own parameters are no other: autocast takes FP32 ones
    assert (under.run.outcome, under.codes) == ("finished", set())


def test_released_gradients_go_with_any_policy_that_does_not_scale(
    launch: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, released = launch(SCRIPT, "bf16-master"), launch(SCRIPT, "bf16-master", "release")
    assert released.run.outcome == "finished" and equal(released.out["model"], kept.out["model"])
    refused = launch(SCRIPT, "fp16-mixed", "release")
    assert refused.run.outcome == "error"
    assert "release_gradients=True from outside" in capsys.readouterr().err
