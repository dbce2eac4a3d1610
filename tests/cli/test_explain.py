"""`halfstep explain`: every page, the list, and what happens to a code that does not exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from halfstep.cli import explain
from halfstep.doctor.codes import CODES

ROOT = Path(__file__).parents[2]


def test_piped_page_is_the_markdown_as_it_is(cli):
    for code in ("HS203", "hs203 "):
        shown = cli("explain", code)
        assert (shown.code, shown.out, shown.err) == (0, CODES["HS203"].page, "")


def test_page_on_a_terminal_is_rendered(cli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    for code in CODES:
        shown = cli("explain", code)
        assert shown.code == 0
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.out)
        prose, _, links_shown = plain.partition("\nLinks\n")
        assert shown.out != plain and max(map(len, prose.splitlines())) <= 80
        assert f"{code}: {CODES[code].title}" in " ".join(plain.split())
        assert "##" not in plain and "```" not in plain and "import " in plain
        links = re.findall(r"^- (\S+)$", CODES[code].page, re.MULTILINE)
        assert links and all(f"- {link}\n" in links_shown for link in links)


def test_without_a_code_all_are_listed_in_their_groups(cli):
    shown = cli("explain")
    assert shown.code == 0
    listed = re.findall(r"^  (HS\d{3})  (\w+) +(.*)$", shown.out, re.MULTILINE)
    assert listed == [(code.code, code.source, code.title) for code in CODES.values()]
    headings = [line for line in shown.out.splitlines() if line in explain.GROUPS.values()]
    assert headings == list(explain.GROUPS.values())
    assert max(map(len, shown.out.splitlines())) <= 80


def test_json_holds_the_list_or_the_page(cli):
    listed = json.loads(cli("explain", "--json").out)
    assert [entry["code"] for entry in listed] == list(CODES)
    assert listed[0] == {"code": "HS101", "title": CODES["HS101"].title, "group": "Range", "source": "examine"}
    (entry,) = [entry for entry in listed if entry["code"] == "HS401"]
    assert json.loads(cli("explain", "HS401", "--json").out) == {**entry, "page": CODES["HS401"].page}


@pytest.mark.parametrize(("given", "near"), [("HS2033", "HS203"), ("hs20", "HS20"), ("XYZ", None), ("", None)])
def test_unknown_code_is_a_usage_error_that_names_near_ones(cli, given, near):
    ended = cli("explain", given)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"halfstep: error: there is no finding {given!r}")
    assert ended.err.count("\n") == 1 and "`halfstep explain` lists all" in ended.err
    assert (near in ended.err) if near else ("Near" not in ended.err)


def test_examples_in_the_help_run(cli):
    examples = re.findall(r"\[bold\]halfstep (.*?)\[/\]", explain.EPILOG)
    assert len(examples) == 3
    for example in examples:
        assert cli(*example.split()).code == 0
    assert "halfstep explain HS203" in cli("explain", "--help").out


def test_index_in_the_docs_is_the_catalogue():
    text = (ROOT / "docs" / "findings.md").read_text()
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == list(explain.GROUPS.values())
    for group, body in zip(parts[1::2], parts[2::2], strict=True):
        rows = [line for line in body.splitlines() if line.startswith("| [")]
        assert rows == [
            f"| [{code.code}](../src/halfstep/doctor/pages/{code.code}.md) | {code.title} | {code.source} |"
            for code in CODES.values()
            if explain.group_of(code) == group
        ]
