"""Models that change, share or compute their weights: docs/scenarios.md."""

from __future__ import annotations

import pytest
from scenario_table import check, of_group


@pytest.mark.parametrize("scenario", of_group("modules"), ids=lambda scenario: scenario.name)
def test_it_is_as_under_plain_pytorch(scenario, tmp_path, monkeypatch):
    if scenario.needs:
        pytest.importorskip(scenario.needs)
    check(scenario, tmp_path, monkeypatch.chdir)
