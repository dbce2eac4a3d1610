"""Parameters in planes under DistributedDataParallel, on two real processes."""

from __future__ import annotations

from pathlib import Path

from two_ranks import on_two_ranks


def test_ddp_trains_planes_as_fp32_parameters_and_what_it_holds_already_stays_plain() -> None:
    for seen in on_two_ranks([str(Path(__file__).with_name("replicated.py"))]):
        for fused in (False, True):
            found = seen[f"fused={fused}"]
            assert found["kept"] and found["same"]
            assert found["apart"] < 2e-2  # one tie that is cast otherwise, and all that follows from it
        assert set(seen["late"]) == {"module.0.weight", "module.3.weight"}
        assert set(seen["late"].values()) == {"a graph or a weak reference holds it"}
