"""A script that sets what FP32 products are computed in, under policies that say it themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.autocast import Float32Switches
from halfstep.autocast.float32 import is_held
from halfstep.compare import compare
from halfstep.launch.session import Session
from halfstep.policy import POLICIES

SETTING = {
    "high": 'torch.set_float32_matmul_precision("high")',
    "medium": 'torch.set_float32_matmul_precision("medium")',
    "older": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "newer": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "newer all": 'torch.backends.fp32_precision = "tf32"',
    "CPU": 'torch.backends.mkldnn.matmul.fp32_precision = "bf16"',
}
SCRIPT = """
import torch
from torch import nn

SETTING

seen = []
ops = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]

class Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        see("backward")
        return gradient

def see(where):
    seen.append([where, *(torch._C._get_fp32_precision_getter(*op) for op in ops)])

class Model(nn.Linear):
    def forward(self, x):
        see("forward")
        return Spy.apply(super().forward(x))

class Watched(torch.optim.SGD):
    def step(self):
        see("step")
        super().step()

model = Model(4, 4)
optimizer = Watched(model.parameters(), lr=0.1)
for _ in range(2):
    SETTING
    loss = model(torch.ones(2, 4)).sum()
    SETTING
    loss.backward()
    SETTING
    optimizer.step()
torch.save({"seen": seen}, "out.pt")
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = Float32Switches.read()
    yield
    before.put_back()


@pytest.mark.parametrize("setting", SETTING)
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed:fp32_ops=linear"])
def test_the_policy_decides_in_forward_backward_and_step(launch: Any, setting: str, policy: str) -> None:
    before = Float32Switches.read()
    ran = launch(SCRIPT.replace("SETTING", SETTING[setting]), policy)
    # The default of convolutions can be put back only by name.
    named = before.precisions | {key: "tf32" for key, value in before.precisions.items() if value is None}
    assert Float32Switches.read() in (before, Float32Switches(named, before.matmul, before.cudnn))
    assert [where for where, *_ in ran.out["seen"]] == ["forward", "backward", "step"] * 2
    for where, *found in ran.out["seen"]:
        assert set(found) <= {"ieee", "none"}, where
    notices = [notice for notice in ran.record.notices if notice.code == "own-tf32"]
    assert len(notices) == (setting != "newer all"), "each operation has a value of its own: that one changes none"
    if setting in ("high", "medium"):
        assert notices[0].where is not None and notices[0].where.endswith(":5"), "the line that sets it"


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_tf32_is_held_too(setting: str) -> None:
    told: list[Any] = []
    session = Session("tf32", POLICIES["tf32"], "cuda", told.append)
    session.float32.hold()
    session.float32.setting(torch.set_float32_matmul_precision, "high")
    assert (told, is_held("tf32")) == ([], True)
    session.float32.setting(torch.set_float32_matmul_precision, setting)
    session.float32.setting(torch.set_float32_matmul_precision, setting)
    assert is_held("tf32")
    assert [notice.code for notice in told] == ["own-tf32"] and "under tf32 they are computed in TF32" in told[
        0
    ].message


def test_beside_16_bit_operations_that_are_examined_fp32_is_fp32() -> None:
    session = Session("bf16-mixed", POLICIES["bf16-mixed"], "cuda", lambda line: None)
    torch.backends.cudnn.allow_tf32 = True
    session.float32.hold()
    assert not is_held("ieee")
    session.float32.exact_beside_16_bit = True
    session.float32.hold()
    assert is_held("ieee")


def test_a_policy_that_says_nothing_of_fp32_leaves_it_to_the_script(launch: Any) -> None:
    ran = launch(SCRIPT.replace("SETTING", SETTING["high"]), "bf16-mixed")
    assert all(found[0] == "tf32" for _, *found in ran.out["seen"])
    assert "own-tf32" not in ran.codes


def test_a_script_that_sets_nothing_gets_no_notice(launch: Any) -> None:
    ran = launch(SCRIPT.replace("SETTING", "pass"), "fp32")
    assert all(found[:3] == ["ieee"] * 3 for _, *found in ran.out["seen"])
    assert "own-tf32" not in ran.codes


def test_products_outside_of_modules_are_fp32_too(launch: Any) -> None:
    source = """
    import torch
    torch.set_float32_matmul_precision("medium")
    a, b = torch.full((256, 256), 1 + 2.0**-12), torch.ones(256, 256)
    torch.save({"product": a @ b}, "out.pt")
    """
    ran = launch(source, "fp32")
    assert torch.equal(ran.out["product"], torch.full((256, 256), 256 * (1 + 2.0**-12)))


def test_a_comparison_says_that_its_baseline_was_held_at_fp32(launch: Any, tmp_path: Path) -> None:
    records = [launch(SCRIPT.replace("SETTING", SETTING["high"]), name).record for name in ("fp32", "bf16-mixed")]
    notices = {result.policy: result.notices for result in compare(records).policies}
    assert any("under fp32 they are computed in FP32" in notice for notice in notices["fp32"])
    assert not any("FP32 products" in notice for notice in notices["bf16-mixed"])
