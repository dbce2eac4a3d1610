"""Scripts under test are written to a temporary folder and run in this process; they save what they saw to out.pt."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep import record
from halfstep.launch import Run, run_under_policy


class Ran:
    """A run, the record it wrote, and what the script saved."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        assert run.record is not None
        self.record = record.read(run.record)
        out = folder / "out.pt"
        self.out: dict[str, Any] = torch.load(out, weights_only=True) if out.exists() else {}
        out.unlink(missing_ok=True)

    @property
    def codes(self) -> set[str]:
        return {notice.code for notice in self.record.notices}


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    count = 0

    def launch(source: str, policy: str, *arguments: str, **options: Any) -> Ran:
        nonlocal count
        count += 1
        script = tmp_path / f"script{count}.py"
        script.write_text(textwrap.dedent(source))
        run = run_under_policy(
            script, arguments, policy, device_type="cpu", record=tmp_path / f"run{count}.jsonl", **options
        )
        return Ran(run, tmp_path)

    return launch
