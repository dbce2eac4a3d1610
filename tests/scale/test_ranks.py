"""Two processes whose gradients differ: they skip together, and their scales stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfstep

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw: see ``ranks.py``."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    source = str(Path(halfstep.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("ranks.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = []
    for process in processes:
        try:
            out, error = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        assert process.returncode == 0, error
        outputs.append(json.loads(out))
    return outputs


STEPPED_TOGETHER = [[True, False, True], [2.0**10, 2.0**9, 2.0**9]]


def test_ranks_skip_together_whoever_overflows(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert [run[:2] for run in rank["ours"]] == [STEPPED_TOGETHER] * 6
        assert rank["group"][:2] == STEPPED_TOGETHER
    assert seen[0]["ours"] == seen[1]["ours"]  # the weights too


def test_it_takes_one_exchange_a_step(seen: list[dict[str, Any]]) -> None:
    assert [rank["exchanges"] for rank in seen] == [6 * 3] * 2


def test_pytorchs_scaler_lets_ranks_drift_apart_and_so_does_ours_where_asked_to(seen: list[dict[str, Any]]) -> None:
    for scaler in ("pytorch", "alone"):
        (applied, scales, _), (other_applied, other_scales, _) = (rank[scaler] for rank in seen)
        assert applied == [True, False, True] and other_applied == [True, True, True]
        assert scales != other_scales


def test_a_rank_without_gradients_is_not_missed(seen: list[dict[str, Any]]) -> None:
    assert [rank["without"] for rank in seen] == [[[False], 2.0**9]] * 2


def test_the_scale_of_one_loss_is_agreed_too(seen: list[dict[str, Any]]) -> None:
    assert [rank["several"] for rank in seen] == [[2.0**10, 2.0**10, 2.0**9]] * 2


@pytest.mark.parametrize("kind", ["replicated", "sharded", "sharded and surveyed"])
def test_data_parallel_models_skip_together(seen: list[dict[str, Any]], kind: str) -> None:
    assert [rank[kind] for rank in seen] == [STEPPED_TOGETHER] * 2


def test_sharded_gradients_are_checked_apart_from_replicated_and_plain_ones(seen: list[dict[str, Any]]) -> None:
    assert [rank["placements"] for rank in seen] == [[False, 2.0**9]] * 2


def test_the_measured_scale_is_that_of_the_rank_with_the_largest_gradients(seen: list[dict[str, Any]]) -> None:
    assert [rank["measured"] for rank in seen] == [2.0**7] * 2  # 2^7 * 2^6 <= 65504 / 4 < 2^8 * 2^6
