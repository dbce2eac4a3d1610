"""An unmodified script under a policy with options."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfstep.launch import run_under_policy

SCRIPT = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
    def forward(self, x):
        hidden = checkpoint(lambda x: torch.softmax(self.body(x), -1), x, use_reentrant=False)
        output = self.head(hidden)
        print(hidden.dtype, output.dtype)
        return output

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for _ in range(2):
    loss = nn.functional.cross_entropy(model(torch.randn(6, 8)), torch.tensor([0, 1, 2, 0, 1, 2]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("policy", "hidden", "output"),
    [
        ("bf16-mixed", "bfloat16", "bfloat16"),
        ("bf16-mixed:keep_fp32=head", "bfloat16", "float32"),
        ("fp16-mixed:rules=cuda:emulate", "float32", "float16"),
        ("fp8-mixed:emulate", "bfloat16", "bfloat16"),
        ("fp16-mixed:fp32_ops=linear:low_ops=softmax", "float16", "float32"),
        ("bf16-master:keep_fp32=h*:rules=cuda", "float32", "float32"),
    ],
)
def test_options_reach_the_script_and_its_recomputation(
    script: Path, policy: str, hidden: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_under_policy(script, [], policy)
    assert (done.outcome, done.steps, done.skipped) == ("finished", 2, 0)
    assert capsys.readouterr().out.splitlines() == [f"torch.{hidden} torch.{output}"] * 2


def test_a_pattern_that_matches_no_module_of_the_script_ends_it(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_under_policy(script, [], "bf16-mixed:keep_fp32=haed")
    assert (done.outcome, done.exit_code) == ("error", 1)
    assert "keep_fp32 pattern 'haed' matches no module of the model. Nearest: head" in capsys.readouterr().err
