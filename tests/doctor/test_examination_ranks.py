"""Under DDP and FSDP2, on two processes: the same findings at the same names, and training as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_two_ranks_are_examined_as_one_process_is(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("examination_ranks.py"))]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    printed = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for lines in printed:
        result = json.loads(lines.splitlines()[-1])
        for kind in ("ddp", "fsdp"):
            seen = result[kind]
            assert seen["same"], kind
            assert seen["clean"] == [], kind
            assert ["HS101", "2"] in seen["named"], (kind, seen["named"])
