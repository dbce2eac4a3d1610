"""Two gloo processes: FSDP2 with uneven shards, torch.distributed.checkpoint, DDP, and an overflow on one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_ranks import PAIRS

import halfstep

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw: see ``optimizer_ranks.py``."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(Path(halfstep.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("optimizer_ranks.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder)],
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
            out, error = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        assert process.returncode == 0, error
        outputs.append(json.loads(out))
    return outputs


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=map("-".join, PAIRS))
def test_sharded_training_is_that_of_the_whole_model_bit_for_bit(seen: list[dict[str, Any]], index: int) -> None:
    """Uneven shards; stochastic rounding and groups of 8-bit codes included."""
    for rank in seen:
        run = rank["as_unsharded"][index]
        assert run["masters"] and run["momenta"]
        if PAIRS[index][1] == "8bit":
            assert "torch.int8" in run["formats"]


def test_the_norm_is_that_of_all_shards(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["clipped"]["masters"]
        assert rank["clipped"]["norm_error"] < 1e-6


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=map("-".join, PAIRS))
def test_a_distributed_checkpoint_resumes_bit_for_bit(seen: list[dict[str, Any]], index: int) -> None:
    assert [rank["resumed"][index] for rank in seen] == [True, True]


def test_saving_before_the_first_step_changes_nothing(seen: list[dict[str, Any]]) -> None:
    """PyTorch runs a hidden step, with a learning rate of 0, on an optimizer without state."""
    assert [rank["saving"] for rank in seen] == [True, True]


def test_an_overflow_in_one_shard_is_skipped_by_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["overflow"] == [[True, False, True], [2.0**10, 2.0**9, 2.0**9], [False, True, False]]


def test_replicas_stay_alike(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["replicated"] == seen[1]["replicated"]
    assert len(set(seen[0]["replicated"])) > 1
