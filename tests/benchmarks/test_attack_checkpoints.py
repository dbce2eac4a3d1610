"""The attacks on checkpoints find nothing, in a number that a test has time for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="file locks")
def test_savers_in_one_folder_and_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("attack", ROOT / "benchmarks" / "attack" / "checkpoints.py")
    assert specification is not None and specification.loader is not None
    attack = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(attack)
    assert attack.main(["--count", "80", "--processes", "2"]) == 0, capsys.readouterr().out
    said = json.loads(capsys.readouterr().out)
    assert said["damaged"] == 80 and said["saves_and_loads"] >= 80 and not said["wrong"]
    assert set(said["answers"]) == {"a state", "whole, but", "not whole"}
