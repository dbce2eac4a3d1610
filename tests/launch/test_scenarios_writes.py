"""Writing to weights and reading them: docs/scenarios.md."""

from __future__ import annotations

import pytest
import torch
from scenario_table import check, of_group

import halfstep.split.tensor


@pytest.mark.parametrize("scenario", of_group("writes"), ids=lambda scenario: scenario.name)
def test_it_is_as_under_plain_pytorch(scenario, tmp_path, monkeypatch):
    if scenario.needs:
        pytest.importorskip(scenario.needs)
    check(scenario, tmp_path, monkeypatch.chdir)


@pytest.mark.parametrize("name", ["many_small_factors", "weight_decay_by_hand", "noise_on_weights", "tiny_values"])
def test_weights_of_16_bits_alone_are_not_as_plain(name, tmp_path, monkeypatch):
    split = halfstep.split.tensor.split

    def rounded(x, upper=torch.bfloat16):
        high, low = split(x, upper)
        return high, low.zero_()

    monkeypatch.setattr(halfstep.split.tensor, "split", rounded)
    (scenario,) = [scenario for scenario in of_group("writes") if scenario.name == name]
    with pytest.raises(AssertionError, match="\nbf16-master: "):
        check(scenario, tmp_path, monkeypatch.chdir)
