"""Parameters in planes under DistributedDataParallel, on two real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def test_ddp_trains_planes_as_fp32_parameters_and_what_it_holds_already_stays_plain() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("replicated.py"))],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=180) for process in started]
    assert all(process.returncode == 0 for process in started), ended[0][1][-3000:] + ended[1][1][-3000:]
    for out, _ in ended:
        seen = json.loads(out.splitlines()[-1])
        for fused in (False, True):
            found = seen[f"fused={fused}"]
            assert found["kept"] and found["same"]
            assert found["apart"] < 2e-2  # one tie that is cast otherwise, and all that follows from it
        assert set(seen["late"]) == {"module.0.weight", "module.3.weight"}
        assert set(seen["late"].values()) == {"a graph or a weak reference holds it"}
