"""Each hazard is named, at its op, on its line; and its FP32 twin is not."""

from __future__ import annotations

import inspect

import hazards
import pytest
import torch
from hazards import HAZARDS, Hazard

from halfstep.doctor import Severity, examine


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_named_at_its_op(name: str) -> None:
    hazard: Hazard = HAZARDS[name]
    findings = examine(hazard.program)
    found = {(f.code, f.place.op) for f in findings if f.place is not None and f.severity > Severity.NOTE}
    assert set(hazard.named) <= found, "\n".join(map(str, findings))
    assert not {"HS506", "HS507"} & {finding.code for finding in findings}


def test_the_line_is_the_one_that_made_it() -> None:
    (finding,) = [f for f in examine(hazards.squares) if f.code == "HS101"]
    lines, first = inspect.getsourcelines(hazards.squares)
    assert finding.place is not None and finding.place.file is not None and finding.place.line is not None
    assert finding.place.file.endswith("hazards.py") and ".pow(2)" in lines[finding.place.line - first]


def test_the_module_is_the_one_that_made_it() -> None:
    (finding,) = [f for f in examine(hazards.outlier_channel) if f.code == "HS101"]
    assert finding.place is not None and (finding.place.module, finding.place.module_type) == ("wo", "Linear")
    assert int(finding.numbers["elements"]) > 1 and "all in channel 7" in finding.what


@pytest.mark.parametrize("name", sorted(set(HAZARDS) - {"attention_masks"}))  # its empty row is NaN in FP32 too
def test_the_same_program_in_fp32_is_healthy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hazards, "FP16", torch.float32)
    monkeypatch.setattr(hazards, "BF16", torch.float32)
    findings = examine(HAZARDS[name].program)
    assert [str(finding) for finding in findings] == []
