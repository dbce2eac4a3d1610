"""Gradient release in two processes: FSDP2 as without release, and DistributedDataParallel refused."""

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
    """What each rank saw: see ``release_ranks.py``."""
    meeting = tmp_path_factory.mktemp("release") / "meeting"
    source = str(Path(halfstep.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("release_ranks.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(meeting)],
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


def test_fsdp2_steps_shards_as_without_release(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for same, leftovers in rank["same"].values():
            assert same
            assert leftovers == [0, 7] * 3  # released, not released


def test_an_overflow_in_one_shard_leaves_the_parameter_alone_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["overflow"] == {
            "steps": [[1, 1], [1, 2], [2, 3]],
            "scales": [2.0**10, 2.0**9, 2.0**9],
            "applied": [True, False, True],
            "finite": True,
        }


def test_ranks_agree_on_the_scale(seen: list[dict[str, Any]]) -> None:
    assert [rank["own"] for rank in seen] == [2.0**9, 2.0**9]


def test_the_norm_is_that_of_all_shards(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        ours, expected = rank["norm"]
        assert ours == pytest.approx(expected, rel=1e-6)
    assert seen[0]["norm"] == seen[1]["norm"]


def test_what_reduces_gradients_later_is_refused(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["replicated"]
        assert found["first"].startswith("SGD(release_gradients=True) cannot step parameters of DistributedDataParall")
        assert "fully_shard" in found["first"] and found["untouched"]
        assert "cannot step parameters of DistributedDataParallel" in found["again"]
        assert "as DistributedDataParallel does" in found["late"]
        assert "of FullyShardedDataParallel (FSDP1)" in found["flat"]
