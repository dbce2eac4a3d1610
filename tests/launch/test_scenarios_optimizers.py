"""Optimizers, wrappers and averages: docs/scenarios.md."""

from __future__ import annotations

import pytest
from scenario_table import PAGE, check, of_group, render


@pytest.mark.parametrize("scenario", of_group("optimizers"), ids=lambda scenario: scenario.name)
def test_it_is_as_under_plain_pytorch(scenario, tmp_path, monkeypatch):
    if scenario.needs:
        pytest.importorskip(scenario.needs)
    check(scenario, tmp_path, monkeypatch.chdir)


def test_the_page_says_what_the_tests_hold():
    assert PAGE.read_text() == render(), "run: python tests/launch/scenario_table.py"
