"""The run record: what is written is what is read, whatever the numbers, the names, or the way the process ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfstep
from halfstep.record import (
    End,
    Header,
    Line,
    Memory,
    Notice,
    RecordError,
    RecordWriter,
    RunRecord,
    Step,
    find,
    read,
)

HEADER = Header(
    started="2026-01-02T03:04:05Z",
    command=("train.py", "--lr", "0.1"),
    policy_requested="auto",
    policy="bf16-mixed",
    reason="bf16 is native",
    seed=0,
    environment={"torch": "2.13.0", "cpu_flags": ["avx2"], "load": 0.5, "nested": {"a": None}},
)
STEP = Step(1, 0, 2.5, None, True, 65536.0, 1.25, 1_000_000, None)

# Any text, lone surrogates included: Python stands them in for the undecodable bytes of a file name.
text = st.text(st.characters(exclude_categories=())) | st.sampled_from(["NaN", "Infinity", "\udcff", "a\nb\r\u2028"])
number = st.floats(width=64)
count = st.integers(0, 2**50)
headers = st.builds(
    Header, text, st.lists(text).map(tuple), text, text, text, count,
    st.dictionaries(text, st.none() | count | st.booleans() | text | st.lists(text)),
)  # fmt: skip
steps = st.builds(
    Step, count, count, st.none() | number, st.none() | number, st.booleans(), st.none() | number, st.none() | number,
    count, st.none() | count, st.booleans(),
)  # fmt: skip
memories = st.builds(Memory, count, count, st.none() | text, st.dictionaries(text, count), st.none() | text)
notices = st.builds(Notice, text, text, st.none() | text)
ends = st.builds(End, text, st.integers(-255, 255), number, count, st.none() | text)


def write(path: Path, *lines: Line) -> Path:
    header, *rest = lines
    assert isinstance(header, Header)
    writer = RecordWriter(path, header)
    for line in rest:
        writer.write(line)
    writer.close()
    return path


def same(a: Any, b: Any) -> bool:
    """Equality of lines in which NaN equals NaN, and 1 is not 1.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def refuse_constant(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(headers, st.lists(steps | notices, max_size=6), memories, ends)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, header: Header, body: list[Step | Notice], memory: Memory, end: End
) -> None:
    path = write(tmp_path_factory.mktemp("r") / "run.jsonl", header, *body, memory, end)
    record = read(path)
    wrote = RunRecord(
        path,
        header,
        tuple(line for line in body if isinstance(line, Step)),
        memory,
        tuple(line for line in body if isinstance(line, Notice)),
        end,
    )
    assert same(record.header, wrote.header)
    assert len(record.steps) == len(wrote.steps) and all(map(same, record.steps, wrote.steps))
    assert record.notices == wrote.notices
    assert record.memory == wrote.memory
    assert same(record.end, wrote.end)
    assert not record.truncated
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=refuse_constant)


def test_non_finite_numbers_survive_as_strict_json(tmp_path: Path) -> None:
    losses = [math.nan, math.inf, -math.inf, 1.0]
    path = write(tmp_path / "r.jsonl", HEADER, *(replace(STEP, step=i, loss=x) for i, x in enumerate(losses)))
    values = [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()[1:]]
    assert [value["loss"] for value in values] == ["NaN", "Infinity", "-Infinity", 1.0]
    assert repr(read(path).losses) == repr(losses)


def test_losses_are_those_of_the_first_optimizer_with_nan_for_none(tmp_path: Path) -> None:
    lines = [replace(STEP, loss=1.0), replace(STEP, optimizer=1, loss=2.0), replace(STEP, step=2, loss=None)]
    losses = read(write(tmp_path / "r.jsonl", HEADER, *lines)).losses
    assert losses[0] == 1.0 and math.isnan(losses[1]) and len(losses) == 2


def test_every_line_is_on_disk_before_the_next(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "deep" / "er" / "r.jsonl", HEADER)  # folders are made
    assert read(writer.path).steps == ()
    for number in (1, 2, 3):
        writer.write(replace(STEP, step=number))
        record = read(writer.path)
        assert [step.step for step in record.steps] == list(range(1, number + 1))
        assert record.end is None and not record.truncated
    writer.close()


def test_a_killed_process_leaves_a_readable_record(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    program = """
import sys
from halfstep.record import Header, RecordWriter, Step
writer = RecordWriter(sys.argv[1], Header("", (), "fp32", "fp32", "", 0, {"long": "x" * 5000}))
number = 0
while True:
    number += 1
    writer.write(Step(number, 0, 0.1 * number, None, True, None, None, 0, None))
    if number == 500:
        print("there", flush=True)
"""
    command = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(halfstep.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    record = read(path)
    assert process.returncode == -signal.SIGKILL
    assert record.end is None
    assert len(record.steps) >= 500
    assert [step.step for step in record.steps] == list(range(1, len(record.steps) + 1))
    assert record.steps[499].loss == 0.1 * 500


def test_a_cut_at_any_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    end = End("error", 1, math.nan, 5, "Größe: ‚x‘")
    whole = write(tmp_path / "r.jsonl", replace(HEADER, reason="ünï"), STEP, end).read_bytes()
    header_bytes = whole.index(b"\n") + 1
    cut = tmp_path / "cut.jsonl"
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        if length < header_bytes:
            with pytest.raises(RecordError, match="is empty" if not length else "ends inside its first line"):
                read(cut)
            continue
        record = read(cut)
        complete = whole[:length].count(b"\n")
        assert len(record.steps) == int(complete >= 2)
        assert (record.end is not None) == (complete == 3)
        assert record.truncated == (whole[length - 1 : length] != b"\n")


def test_an_accelerators_memory_and_the_hosts_are_told_apart(tmp_path: Path) -> None:
    on_host, on_gpu = (Memory(3, size, None, {}, device) for size, device in ((9, "cpu"), (5, "cuda")))
    for number, lines in enumerate(([on_host, on_gpu], [on_gpu, on_host])):
        found = read(write(tmp_path / f"{number}.jsonl", HEADER, *lines))
        assert (found.memory, found.host_memory) == (on_gpu, on_host)
    found = read(write(tmp_path / "cpu.jsonl", HEADER, on_host))
    assert (found.memory, found.host_memory) == (on_host, None)


def test_records_of_schema_1_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "old.jsonl", replace(HEADER, schema=1), STEP)
    with path.open("a") as file:
        file.write('{"kind": "memory", "step": 3, "peak_bytes": 7, "at_op": null, "by_category": {"a": 7}}\n')
    found = read(path)
    assert (found.header.schema, found.memory, found.host_memory) == (1, Memory(3, 7, None, {"a": 7}), None)
    assert replace(HEADER).schema == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello\n", r":1: is not JSON"),
        (b'{"a": 1}\n', r":1: is not a line of a run record"),
        (b"[1, 2]\n", r":1: is not a line of a run record"),
        (b'{"kind": []}\n', r":1: is not a line of a run record"),
        (b'{"kind": "end", "outcome": "finished"}\n', r":1: a end line lacks or has unknown fields.*exit_code"),
        (b'{"kind": "header", "schema": 99}\n', r":1: record schema 99, this halfstep reads 1"),
        (b'{"kind": "header"}\n', r":1: record schema None"),
        (b'{"kind": "header", "schema": 1}\n', r":1: a header line lacks or has unknown fields"),
        (bytes(range(256)) * 20, r":1: is not JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r":1: is not JSON"),
    ],
)
def test_what_is_no_record_is_said_to_be_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_record_without_header_and_damage_in_the_middle_are_found(tmp_path: Path) -> None:
    whole = write(tmp_path / "r.jsonl", HEADER, STEP, STEP).read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join(whole[1:]))
    with pytest.raises(RecordError, match="first line is not a header"):
        read(bad)
    bad.write_bytes(whole[0] + whole[1][:20] + b"\n" + whole[2])
    with pytest.raises(RecordError, match=r"bad\.jsonl:2: is not JSON"):
        read(bad)
    bad.write_bytes(whole[0] + whole[1].replace(b'"rss_bytes"', b'"rss"'))
    with pytest.raises(RecordError, match="a step line lacks or has unknown fields"):
        read(bad)


def test_missing_files_and_folders_are_errors_of_the_record(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="Is a directory"):
        read(tmp_path)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        RecordWriter(path, HEADER)
    assert path.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        RecordWriter(tmp_path / "file" / "r.jsonl", HEADER)  # a file stands where the folder should


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write into any folder")
def test_a_locked_folder_is_an_error(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        RecordWriter(locked / "r.jsonl", HEADER)


def test_find_takes_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    a, b, notes = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "notes.txt"
    assert find([tmp_path]) == [a, b]
    assert find([notes, tmp_path]) == [notes, a, b]
    with pytest.raises(RecordError, match="no run records"):
        find([tmp_path / "empty"])
    with pytest.raises(RecordError, match="no such file or folder"):
        find([tmp_path / "nowhere"])
