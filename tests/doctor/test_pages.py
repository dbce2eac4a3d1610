"""Every code has a page; what a page shows happens; and the doctor says so of the broken code and not of the fixed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.doctor import examine
from halfstep.doctor.codes import CODES, Code

SECTIONS = ["What it is", "How it looks", "Reproduction", "What to do", "When it is silent", "Links"]
SOURCE = Path(__file__).parents[2] / "src" / "halfstep" / "doctor" / "pages"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+|https://arxiv\.org/abs/\d{4}\.\d{5}")

everyone = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
#: `examine` finds these, and of those of a run what shows in a few steps.
examined = [code for code in CODES.values() if code.source == "examine" or "\ndef broken(" in code.page]


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def namespaces() -> dict[str, dict[str, Any]]:
    return {}


def run_blocks(code: Code, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the page's blocks define, run once for all tests of the page."""
    if code.code not in known:
        namespace: dict[str, Any] = {"__name__": "page"}
        with torch.random.fork_rng(devices=[]):
            for block in BLOCK.findall(code.page):
                exec(compile(block, f"{code.code}.md", "exec"), namespace)
        known[code.code] = namespace
    return known[code.code]


def test_there_is_a_page_for_every_code_and_no_other() -> None:
    assert {path.stem for path in SOURCE.glob("*")} == set(CODES)


@everyone
def test_page_has_the_catalogues_title_and_all_sections(code: Code) -> None:
    page = code.page
    assert page.splitlines()[0] == f"# {code.code}: {code.title}"
    assert list(sections(page)) == SECTIONS
    assert all(body.strip() for body in sections(page).values())
    assert len(page.splitlines()) <= 64
    assert max(map(len, page.splitlines())) <= 120


@everyone
def test_reproduction_is_short_and_asserts_what_it_shows(code: Code) -> None:
    (block,) = BLOCK.findall(sections(code.page)["Reproduction"])
    lines = [line for line in block.splitlines() if not re.match(r"\s*(#.*)?$|import |from ", line)]
    assert len(lines) <= 20
    assert "\nassert " in block


@everyone
def test_links_are_threads_and_none_comes_twice(code: Code) -> None:
    links = re.findall(r"^- (\S+)$", sections(code.page)["Links"], re.MULTILINE)
    assert len(links) >= 2
    assert len(set(links)) == len(links)
    for link in links:
        assert THREAD.fullmatch(link), link


@everyone
def test_codes_named_in_a_page_exist(code: Code) -> None:
    assert set(re.findall(r"HS\d{3}", code.page)) <= set(CODES)


@everyone
def test_code_of_the_page_runs(code: Code, namespaces: dict[str, dict[str, Any]]) -> None:
    run_blocks(code, namespaces)


@pytest.mark.parametrize("code", examined, ids=lambda code: code.code)
def test_doctor_finds_the_broken_code_and_not_the_fixed(code: Code, namespaces: dict[str, dict[str, Any]]) -> None:
    namespace = run_blocks(code, namespaces)
    broken = examine(namespace["broken"])
    assert code.code in {finding.code for finding in broken}, [str(finding) for finding in broken]
    fixed = examine(namespace["fixed"])
    assert code.code not in {finding.code for finding in fixed}, [str(finding) for finding in fixed]


@pytest.mark.parametrize("code", [c for c in CODES.values() if c.source in ("lint", "predict")], ids=lambda c: c.code)
def test_pages_of_lint_and_predict_ask_the_doctor_themselves(code: Code) -> None:
    parts = sections(code.page)
    assert re.search(rf'assert .*"{code.code}" in ', parts["Reproduction"])
    assert re.search(rf'assert .*"{code.code}" not in ', parts["What to do"])
