"""Attacks on `halfstep.save` and `halfstep.load`: several savers in one folder, and files that are damaged inside.

    python benchmarks/attack/checkpoints.py --count 2000

*concurrent*: processes save to names of their own that share their first 40 letters, as files of ranks do, and to one
name that they all share; every load in between has to give a state that somebody saved, whole. *damaged*: bytes of the
archive are changed, taken away or doubled, some with a right checksum over them (which is no signature). A load has to
give `CheckpointError` or, where the bytes under a right checksum still make a state, a state. Ends with 1 if anything
else happened; prints what did, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import halfstep
from halfstep.checkpoint import file

NAME = "a-run-whose-name-is-long-enough-to-be-cut-at-forty"
WRITER = """
import sys, torch, halfstep
folder, rank, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for step in range(count):
    for name in (f"{folder}/{sys.argv[4]}-{rank}.pt", f"{folder}/shared.pt"):
        halfstep.save({"w": torch.full((100 + step % 50,), float(step)), "step": step, "rank": rank}, name)
"""


def concurrent(count: int, processes: int) -> tuple[int, list[str]]:
    """Saves and loads that were made, and what went wrong in them."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        each = -(-count // (2 * processes))
        command = [sys.executable, "-c", WRITER, folder]
        writers = [
            subprocess.Popen([*command, str(rank), str(each), NAME], stderr=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        loads = 0
        while any(writer.poll() is None for writer in writers):
            if not (Path(folder) / "shared.pt").exists():
                time.sleep(0.01)
                continue
            loads += 1
            wrong += _misread(Path(folder) / "shared.pt")
        for writer in writers:
            _, errors = writer.communicate()
            if writer.returncode:
                wrong.append(f"a writer ended with {writer.returncode}: {errors.strip().splitlines()[-1:]}")
        for rank in range(processes):
            wrong += _misread(Path(folder) / f"{NAME}-{rank}.pt", each - 1)
        left = [path.name for path in Path(folder).iterdir() if path.name.endswith(".tmp")]
        if left:
            wrong.append(f"temporary files were left: {left}")
    return 2 * each * processes + loads, wrong


def damaged(count: int, seed: int) -> tuple[int, list[str], Counter[str]]:
    """Files that were loaded, what went wrong, and what was answered."""
    draw, wrong, answers = random.Random(seed), [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        state = {"w": torch.arange(50.0).reshape(5, 10).t(), "h": [torch.ones(3).bfloat16()], "step": 7, "name": "text"}
        halfstep.save(state, path)
        whole = path.read_bytes()
        for _ in range(count):
            sealed = draw.random() < 0.7
            path.write_bytes(
                resealed(_spoilt(whole[: -file._COMMENT_LENGTH], draw)) if sealed else _spoilt(whole, draw)
            )
            try:
                halfstep.load(path)
                answers["a state"] += 1
                if not sealed and path.read_bytes() != whole:
                    wrong.append("bytes under the old checksum were changed, and a state was loaded")
            except halfstep.CheckpointError as error:
                answers["whole, but" if "is whole, but" in str(error) else "not whole"] += 1
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
    return count, wrong, answers


def resealed(archive: bytes) -> bytes:
    """An archive, which ends in the length of its comment, with a seal that is right."""
    size = len(archive) + file._COMMENT_LENGTH
    sealed = archive[:-2] + file._COMMENT_LENGTH.to_bytes(2, "little") + file._MARK.format(size).encode()
    return sealed + hashlib.sha256(sealed).hexdigest().encode()


def _spoilt(data: bytes, draw: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        place = draw.randrange(len(spoilt))
        how = draw.random()
        if how < 0.8:
            spoilt[place] = draw.randrange(256)
        elif how < 0.9:
            del spoilt[place : place + draw.choice((1, 4, 64))]
        else:
            spoilt[place:place] = spoilt[place : place + draw.choice((1, 4, 64))]
    return bytes(spoilt)


def _misread(path: Path, step: int | None = None) -> list[str]:
    """What is wrong with a file that a writer has written."""
    try:
        state = halfstep.load(path)
    except halfstep.CheckpointError as error:
        return [f"a file that was saved does not load: {error}"]
    expected = torch.full((100 + state["step"] % 50,), float(state["step"]))
    if not torch.equal(state["w"], expected) or step not in (None, state["step"]):
        return [f"{path.name} holds another state than was saved: step {state['step']}"]
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="saves, and damaged files (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="savers at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    options = parser.parse_args(arguments)
    saves, wrong = concurrent(options.count, options.processes)
    files, also_wrong, answers = damaged(options.count, options.seed)
    kinds = Counter(wrong + also_wrong)
    print(json.dumps({"saves_and_loads": saves, "damaged": files, "answers": answers, "wrong": kinds}, indent=2))
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
