"""A plugin for pytest: writes a line for each test as it ends, into the file that ``HALFSTEP_GPU_TESTS`` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu import records

RESULTS = "HALFSTEP_GPU_TESTS"


def pytest_runtest_logreport(report: Any) -> None:
    """Called for each phase of a test; under xdist by its workers, and then by the process that hears of all."""
    if "PYTEST_XDIST_WORKER" in os.environ or RESULTS not in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        said = str(report.longrepr)[-600:] if report.failed else ""
        path, seconds = Path(os.environ[RESULTS]), round(report.duration, 2)
        records.append(path, "tests", report.nodeid, "test", outcome=report.outcome, seconds=seconds, said=said)
