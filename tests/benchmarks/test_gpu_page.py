"""docs/gpu.md is what the result files say: nothing where there is none, tables where there is one."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n"


@pytest.fixture
def page() -> Any:
    specification = importlib.util.spec_from_file_location("gpu_page", ROOT / "benchmarks" / "gpu_page.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def times(ms: float) -> dict[str, Any]:
    return {"ms": ms, "quartiles": [ms * 0.9, ms * 1.1], "steps": 10}


def trained(ms: float, **values: Any) -> dict[str, Any]:
    told = {"tokens_per_s": 123456, "mfu": 0.412, "peak_gib": 21.25, "step_launches": 700, "sync_warnings": 1}
    return {**times(ms), **told, "rows": 32, "context": 1024, **values}


def stepped(ms: float, **values: Any) -> dict[str, Any]:
    told = {"gb_per_s": 3600.4, "of_copy": 0.85, "against_torch_fused": 0.91, "bytes_moved": 26.01, "bytes_held": 14.0}
    return {**times(ms), **told, "parameters": 911_000_000, "step_launches": 3, **values}


#: Made up: no card gave these numbers.
DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "run": {"device": "cuda", "set": "main", "tiny": False, "started": "2031-02-03T04:05:06+00:00"},
    "environment": {"device": "Imaginary 9000", "torch": "2.99.0", "cuda": "19.1", "halfstep": "0.1.0"},
    "sections": {
        name: {"status": "ok", "tiny": False}
        for name in ("training", "optimizers", "seven_billion", "gemm", "float8", "comparison", "numerics", "waits")
    },
    "checks": [],
    "crashes": [],
    "notes": [],
    "measured": {
        "numerics": {"tests": {"passed": 200, "skipped": 2}},
        "training": {
            "torch bf16 autocast": trained(100.0),
            "halfstep bf16-mixed": trained(99.0, mfu=None),
            "largest batch, torch bf16 autocast, 48 rows": {"fits": False},
        },
        "optimizers": {
            "bits": {"equal": {}},
            "copy": {**times(2.0), "gb_per_s": 4234.5},
            "torch fused fp32": stepped(7.0, against_torch_fused=None),
            "halfstep exact + fp32": stepped(6.37),
        },
        "seven_billion": {
            "bf16-master, 24bit + 8bit": {
                "fits": True, "limit_gib": 78.6, "peak_gib": 55.02, "tokens_per_s": 9000, "rows": 2, "context": 2048,
            },
            "bf16 autocast, FP32 weights, torch AdamW": {
                "fits": False, "limit_gib": 78.6, "peak_gib": 78.5, "rows": 2, "context": 2048,
            },
        },
        "gemm": {
            "bf16 8192": {**times(1.4), "tflops": 780.2, "of_datasheet": 0.789},
            "bf16 2048": {**times(0.1), "tflops": 500.0, "of_datasheet": None},
            "fp8 8192": {**times(0.8), "tflops": 1400.0, "of_datasheet": 0.707},
        },
        "float8": {"MLP of 8192, bf16": {**times(20.0), "speed_up": 1.0, "error": 0.00234}},
        "comparison": {
            "compare fp32": {"ms": 88.0, "speed_up": None, "peak_mib": 900.0},
            "compare bf16-mixed": {"ms": 44.0, "speed_up": 2.0, "peak_mib": 700.0},
            "the script alone": {"ms": 87.0, "steps": 40},
        },
        "waits": {
            "halfstep bf16-mixed, not clipped": {"waits": 0, "launches": 600, "where": {}},
            "halfstep bf16-mixed, clipped": {"waits": 1, "launches": 620, "where": {}},
        },
    },
}  # fmt: skip


def test_a_document_becomes_tables(page: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu-imaginary.json").write_text(json.dumps(DOCUMENT))
    (tmp_path / "optimizers-cuda.json").write_text("{}")  # of another benchmark
    text = page.render(PAGE, page.load(tmp_path))
    assert text.startswith("before\n<!-- measured: begin -->\n### Imaginary 9000\n")
    assert text.endswith("\n<!-- measured: end -->\nafter\n") and "old" not in text
    lines = text.splitlines()
    assert "Imaginary 9000, PyTorch 2.99.0, CUDA 19.1, halfstep 0.1.0, 2031-02-03." in lines
    assert "Tests marked `gpu`: 200 passed, 2 skipped." in lines
    for row in (
        "| torch bf16 autocast | **100.00** (90.00–110.00) | 1.00 | 123,456 | 41 % | 21.2 | 700 | 1 |",
        "| halfstep bf16-mixed | **99.00** (89.10–108.90) | 0.99 | 123,456 |  | 21.2 | 700 | 1 |",
        "Largest batch, torch bf16 autocast, 48 rows: does not fit.",
        "| torch fused fp32 | **7.00** (6.30–7.70) |  | 3,600 | 85 % | 26.0 | 14.0 | 3 |",
        "| halfstep exact + fp32 | **6.37** (5.73–7.01) | 0.91 | 3,600 | 85 % | 26.0 | 14.0 | 3 |",
        "| bf16-master, 24bit + 8bit | yes | 55.0 | 9,000 |",
        "| bf16 autocast, FP32 weights, torch AdamW | no | 78.5 |  |",
        "| size | bf16 | fp8 |",
        "| 8192³ | 780 (79 %) | 1400 (71 %) |",
        "| 2048³ | 500  |  |",
        "| MLP of 8192, bf16 | **20.00** (18.00–22.00) | 1.00 | 0.0023 |",
        "| `bf16-mixed` | 44.0 | 2.00 | 700 MiB |",
        "| halfstep bf16-mixed | 0 | 1 | 600 | 620 |",
    ):
        assert row in lines, row
    tables = [line.count("|") for line in lines if line.startswith("|")]
    heads = [index for index, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 7 and all(lines[i].count("|") == lines[i - 1].count("|") for i in heads) and min(tables) >= 4


def test_what_failed_or_was_cut_is_told(page: Any) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["sections"]["training"] = {"status": "limit", "tiny": False}
    document["checks"] = [{"name": "AdamW takes a step", "ok": False}, {"name": "all is well", "ok": True}]
    text = page.block([document])
    assert "Checks that failed: AdamW takes a step." in text
    assert "Sections that did not end: training (limit)." in text


def test_trials_and_runs_on_a_cpu_are_no_measurements(page: Any) -> None:
    on_cpu, tried = copy.deepcopy(DOCUMENT), copy.deepcopy(DOCUMENT)
    on_cpu["run"]["device"] = "cpu"
    for section in tried["sections"].values():
        section["tiny"] = True
    assert page.block([]) == page.block([on_cpu, tried]) == page.NOTHING
    assert "Nothing of halfstep has been measured on a GPU yet" in page.NOTHING


def test_sections_may_be_missing(page: Any) -> None:
    for name in DOCUMENT["measured"]:
        document = copy.deepcopy(DOCUMENT)
        document["measured"] = {name: DOCUMENT["measured"][name]}
        assert "### Imaginary 9000" in page.block([document])


def test_the_page_is_what_the_result_files_say(page: Any) -> None:
    text = page.PAGE.read_text()
    assert page.render(text, page.load()) == text, "run: python benchmarks/gpu_page.py"
