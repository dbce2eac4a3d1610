"""The command line, run in this process as ``halfstep …`` would be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from halfstep.cli import main

TRAIN = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
x = torch.randn(64, 8)
y = x.square().mean(1, keepdim=True)
for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
    optimizer.zero_grad()
    loss = (net(x + 0.1 * torch.randn_like(x)) - y).square().mean()
    loss.backward()
    optimizer.step()
print("trained")
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in an empty folder that holds ``train.py``; a traceback of ours fails the test by escaping."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "train.py").write_text(TRAIN)

    def cli(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["halfstep", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return cli
