"""Checkpoints: what goes in comes out, bit for bit, and whatever happened to a file in between is noticed."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import halfstep
from halfstep.checkpoint import CheckpointError, file

FORMATS = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: its file limits, signals and /proc")


def bits(tensor: Tensor) -> bytes:
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    codes = raw[: len(raw) // tensor.itemsize * tensor.itemsize].reshape(-1, tensor.itemsize)
    where = torch.arange(len(codes)).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).reshape(-1)
    return codes[where].numpy().tobytes()


def assert_same(loaded: Any, saved: Any) -> None:
    """The slow, obvious comparison: types exactly, tensors by bits, NaN equal to itself."""
    assert type(loaded) is type(saved)
    if isinstance(saved, Tensor):
        assert (loaded.dtype, loaded.size(), loaded.requires_grad) == (saved.dtype, saved.size(), saved.requires_grad)
        assert bits(loaded) == bits(saved)
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for key, loaded_key in zip(saved, loaded, strict=True):
            assert_same(loaded_key, key)
            assert_same(loaded[key], saved[key])
        if isinstance(saved, OrderedDict):
            assert_same(vars(loaded), vars(saved))
    elif isinstance(saved, (list, tuple)):
        assert len(loaded) == len(saved)
        for one, other in zip(loaded, saved, strict=True):
            assert_same(one, other)
    elif isinstance(saved, float):
        assert struct.pack("d", loaded) == struct.pack("d", saved)
    elif isinstance(saved, complex):
        assert_same([loaded.real, loaded.imag], [saved.real, saved.imag])
    else:
        assert loaded == saved


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(FORMATS))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.binary(min_size=(math.prod(shape) + 1) * dtype.itemsize, max_size=(math.prod(shape) + 1) * 16))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    values = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
    tensor = values.as_strided(shape, torch.empty(shape).stride(), draw(st.integers(0, 1)))
    if draw(st.booleans()):
        tensor = tensor.T if tensor.ndim == 2 else tensor[:: draw(st.integers(1, 3))] if tensor.ndim else tensor
    if draw(st.booleans()) and dtype.is_floating_point and dtype.itemsize > 1:
        tensor = tensor.detach().requires_grad_()
    return nn.Parameter(tensor, tensor.requires_grad) if draw(st.booleans()) else tensor


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**2039) + 1, 2**2039 - 1),
    st.floats(),
    st.text(),
    st.binary(min_size=1),
    st.sampled_from(
        [torch.int8, torch.int4, torch.float8_e5m2, torch.device("cuda:3"), torch.Size([2, 0]), torch.strided]
    ),
)
KEYS = st.one_of(PLAIN, st.tuples(PLAIN, PLAIN)).filter(lambda key: key == key and "nan" not in repr(key))
STATES = st.recursive(
    st.one_of(PLAIN, tensors(), st.complex_numbers(), st.binary().map(bytearray), st.sets(st.integers() | st.text())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=8,
)
within_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


@within_a_folder
@given(STATES)
def test_what_goes_in_comes_out(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "state.pt"
    halfstep.save(state, path)
    assert_same(halfstep.load(path), state)
    assert_same(torch.load(path, weights_only=True), state)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_format_keeps_its_bits_as_whole_view_scalar_and_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = (torch.arange(256 * dtype.itemsize) * 167 % 256).to(torch.uint8)
    whole = (codes & 1 if dtype is torch.bool else codes).view(dtype)
    odd = torch.cat([whole.view(torch.uint8), torch.ones(1, dtype=torch.uint8)])[:-1].view(dtype)  # a byte too much
    state = [whole, whole[250:], whole[::100], whole[3], whole[:0], whole.reshape(16, 16).T, odd]
    for name, part in enumerate([*([tensor] for tensor in state), state]):
        halfstep.save(part, tmp_path / f"{name}.pt")
        assert_same(halfstep.load(tmp_path / f"{name}.pt"), part)


@within_a_folder
@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 64), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3),
)
@example(64, [(0, 64, 8), (4, 64, 8)], 0)  # interleaved
@example(64, [(0, 20, 1), (2, 4, 1), (10, 12, 1)], 0)  # the last overlaps the first only
@example(64, [(0, 4, 1), (2, 6, 1), (0, 4, 1), (60, 62, 1)], 0)  # overlapping, the same twice, and apart
def test_memory_is_shared_as_it_was(
    tmp_path: Path, size: int, slices: list[tuple[int, int, int]], written: int
) -> None:
    base = torch.arange(float(size))
    saved = [base[start:stop:step] for start, stop, step in slices]
    halfstep.save(saved, tmp_path / "views.pt")
    loaded = halfstep.load(tmp_path / "views.pt")
    assert_same(loaded, saved)
    for views in (saved, loaded):
        views[written % len(slices)].fill_(-1.0)
    assert_same(loaded, saved)


def test_what_a_small_view_does_not_see_is_not_written(tmp_path: Path) -> None:
    big = torch.zeros(1000, 1000)
    views = {
        "row": big[3],
        "same row": big[3],
        "column": big[:, 5],
        "wide": big[7, :1].expand(1_000_000),
        "none": big[:0],
        "parameter": nn.Parameter(big[8]),
    }
    for name, view in views.items():
        halfstep.save(view, tmp_path / "view.pt")
        assert (tmp_path / "view.pt").stat().st_size < 8_000, name
    halfstep.save([big[3], big[3, :10], big[900]], tmp_path / "view.pt")
    assert (tmp_path / "view.pt").stat().st_size < 12_000
    halfstep.save([big[:500], big[0]], tmp_path / "view.pt")  # half of it: written where it lies, without a copy
    assert (tmp_path / "view.pt").stat().st_size > 4_000_000


def test_what_a_small_view_skips_is_left_out_and_its_order_in_memory_kept(tmp_path: Path) -> None:
    big = torch.randn(1000, 64, 3)
    for view in (big[:3, ::2], big.permute(2, 0, 1)[:, 5:9, ::8], big[::100].transpose(0, 2)):
        halfstep.save(view, tmp_path / "view.pt")
        loaded = halfstep.load(tmp_path / "view.pt")
        assert torch.equal(loaded, view)
        order = [sorted(range(3), key=lambda d: -t.stride(d)) for t in (loaded, view)]
        assert order[0] == order[1] and loaded.untyped_storage().nbytes() == loaded.nbytes
    for whole in (big, big.permute(2, 0, 1), big[:900]):  # where at least half is seen, strides are as they were
        halfstep.save(whole, tmp_path / "view.pt")
        assert halfstep.load(tmp_path / "view.pt").stride() == whole.stride()


def test_every_dtype_of_this_torch_is_kept_or_refused_when_it_is_saved(tmp_path: Path) -> None:
    """As a value, and as the format of a tensor."""
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert len(dtypes) > 30
    warnings.simplefilter("ignore")  # torch's, of quantized tensors
    for dtype in dtypes:
        for make in (lambda dtype: dtype, lambda dtype: torch.empty(4, dtype=dtype)):
            try:
                state = make(dtype)
            except (RuntimeError, NotImplementedError, TypeError):  # torch makes no such tensor
                continue
            try:
                halfstep.save(state, tmp_path / "one.pt")
            except CheckpointError:
                continue
            loaded = halfstep.load(tmp_path / "one.pt")
            assert loaded is dtype or loaded.dtype is dtype


def test_the_state_is_left_as_it_was(tmp_path: Path) -> None:
    big = torch.zeros(1000)
    state = {"a": big[:3], "b": [big[:3]], "c": nn.Parameter(torch.ones(2))}
    before = (list(state.values()), state["a"].untyped_storage().nbytes())
    halfstep.save(state, tmp_path / "state.pt")
    assert all(one is other for one, other in zip(state.values(), before[0], strict=True))
    assert state["a"].untyped_storage().nbytes() == before[1] == 4000


def test_one_object_in_two_places_stays_one(tmp_path: Path) -> None:
    shared, weight = [1], torch.ones(2)
    halfstep.save({"a": shared, "b": (shared, weight), "c": weight}, tmp_path / "state.pt")
    loaded = halfstep.load(tmp_path / "state.pt")
    assert loaded["a"] is loaded["b"][0] and loaded["c"] is loaded["b"][1]


def test_conjugated_hooked_and_computed_tensors_are_saved_by_value(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    hooked = torch.ones(2, requires_grad=True)
    hooked.register_hook(lambda grad: grad)
    hooked.note = object()  # type: ignore[attr-defined]
    small = torch.arange(100) * (1 + 2j)  # of which parts are copied
    views = [small[1:3], small[1:3].conj(), small[5:7].imag, small[5:7].conj().imag]
    state = [values.conj(), values.conj().imag, (hooked * 2), hooked, *views]
    halfstep.save(state, tmp_path / "state.pt")
    loaded = halfstep.load(tmp_path / "state.pt")
    assert [tensor.tolist() for tensor in loaded] == [tensor.tolist() for tensor in state]
    assert [tensor.requires_grad for tensor in loaded] == [False, False, True, True] + [False] * 4


def training(policy: str) -> tuple[nn.Module, torch.optim.lr_scheduler.LRScheduler, halfstep.MixedPrecision]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 16, bias=False))
    model[2].weight = model[0].weight
    mp = halfstep.MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=0.01), policy=policy)
    return model, torch.optim.lr_scheduler.MultiStepLR(mp.optimizer, [2, 2, 5]), mp


def train(parts: tuple[Any, Any, halfstep.MixedPrecision], steps: range) -> None:
    model, scheduler, mp = parts
    for step in steps:
        tokens = torch.arange(step, step + 12).reshape(3, 4) % 16
        with mp.autocast():
            loss = nn.functional.cross_entropy(model(tokens).reshape(-1, 16), tokens.reshape(-1))
        mp.backward(loss)
        mp.step()
        scheduler.step()


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "bf16-master"])
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    parts = training(policy)
    train(parts, range(4))
    state = {name: part.state_dict() for name, part in zip(("model", "scheduler", "mp"), parts, strict=True)}
    assert type(state["scheduler"]["milestones"]) is Counter
    halfstep.save(state, tmp_path / "run.pt")
    train(parts, range(4, 8))

    resumed = training(policy)
    loaded = halfstep.load(tmp_path / "run.pt")
    assert loaded["model"]["0.weight"].data_ptr() == loaded["model"]["2.weight"].data_ptr()
    assert vars(loaded["model"])["_metadata"] == vars(parts[0].state_dict())["_metadata"]
    for name, part in zip(("model", "scheduler", "mp"), resumed, strict=True):
        part.load_state_dict(loaded[name])
    train(resumed, range(4, 8))
    for one, other in zip(resumed, parts, strict=True):
        assert_same(one.state_dict(), other.state_dict())


# --- refused before anything is written ---


def circle() -> list[Any]:
    inner: list[Any] = []
    inner.append({"x": inner})
    return inner


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(sys.getrecursionlimit() * 2):
        value = [value]
    return value


def released() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def two_formats() -> list[Tensor]:
    tensor = torch.ones(4)
    return [tensor, tensor.view(torch.int32)]


def two_formats_of_two_storages() -> list[Tensor]:
    array = np.ones(4, np.float32)
    return [torch.from_numpy(array), torch.from_numpy(array.view(np.int32))]


class Text(str):
    pass


UNFIT: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: {"model": {"f": [1, lambda: 0]}}, "state['model']['f'][1] is of type function", "store the tensors"),
    (lambda: {"model": nn.Linear(1, 1)}, "state['model'] is of type torch.nn.modules.linear.Linear", "state_dict()"),
    (lambda: (Path(),), "state[0] is of type pathlib", "plain values"),
    (lambda: {"loss": np.float64(1.0)}, "state['loss'] is of type numpy.float64", "it.item()"),
    (lambda: {np.int64(1): 0}, "a key of state is of type numpy.int64", "it.item()"),
    (lambda: {(1, (Path(),)): 0}, "a key of state is of type pathlib", "plain values"),
    (lambda: [{Path()}], "an element of state[0] is of type pathlib", "plain values"),
    (lambda: {"x": np.ones(2)}, "state['x'] is of type numpy.ndarray", "torch.from_numpy"),
    (lambda: {"v": torch.__version__}, "state['v'] is of type torch.torch_version.TorchVersion", "str(it)"),
    (lambda: {"x": Text("x")}, "Text", "str(it)"),
    (lambda: {"x": defaultdict(int)}, "state['x'] is of type collections.defaultdict", "dict(it)"),
    (lambda: {"x": frozenset()}, "state['x'] is of type frozenset", "plain values"),
    (lambda: {"x": signal.SIGINT}, "state['x'] is of type signal.Signals", "int(it)"),
    (lambda: {"x": torch.ones(1).untyped_storage()}, "state['x'] is of type torch.storage.UntypedStorage", "tensors"),
    (lambda: {"x": torch.Tensor}, "state['x'] is of type torch._C._TensorMeta", "plain values"),
    (lambda: [2**2039], "state[0] is an integer of 2040 bits", "as text"),
    (lambda: [b""], "state[0] is an empty bytes object", "None or bytearray()"),
    (circle, "state[0]['x'] is a list that contains itself", "break the circle"),
    (deep, "nested too deeply", "flatten"),
    (lambda: [torch.ones(2, device="meta")], "state[0] is on the meta device", "materialise"),
    (lambda: [torch.eye(2).to_sparse()], "state[0] is a torch.sparse_coo tensor", "dense tensors"),
    (lambda: [torch.empty(2, dtype=torch.int4)], "state[0] is of torch.int4", "uint8"),
    (lambda: [nn.UninitializedParameter()], "state[0] is a torch.nn.parameter.UninitializedParameter", "plain tensor"),
    (released, "state needs 16 bytes of memory, and 0 are left", "Gather"),
    (two_formats, "state[0] (torch.float32) and state[1] (torch.int32) are views of the same memory", "clone()"),
    (two_formats_of_two_storages, "view the same data as different types", "torch.save refused"),
]


@pytest.mark.parametrize(("make", "place", "remedy"), UNFIT, ids=[place for _, place, _ in UNFIT])
def test_what_could_not_be_loaded_is_not_saved(
    make: Callable[[], Any], place: str, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    halfstep.save("the old one", path)
    with pytest.raises(CheckpointError, match=re.escape(place)) as caught:
        halfstep.save(make(), path)
    assert remedy in str(caught.value)
    assert halfstep.load(path) == "the old one" and len(list(tmp_path.iterdir())) == 1


def test_sharded_tensors_are_left_to_torch_distributed(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), DeviceMesh("cpu", [0]))
        for tensor in (sharded, nn.Parameter(sharded)):
            with pytest.raises(CheckpointError, match=r"state\['w'\] .*DTensor.* torch\.distributed\.checkpoint"):
                halfstep.save({"w": tensor}, tmp_path / "state.pt")
    finally:
        distributed.destroy_process_group()
    assert list(tmp_path.iterdir()) == []


# --- files that are not what was written ---

SMALL = {"w": torch.arange(5, dtype=torch.int16), "step": 7}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        halfstep.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save(SMALL, path)
    whole = path.read_bytes()
    assert 500 < len(whole) < 5000
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refused(path)
        if length < 4:
            assert "is empty: 0 bytes" in message if length == 0 else f"it has {length} bytes" in message
        elif length < len(whole) - 64:
            assert f"cut short or damaged: its {length} bytes" in message
        else:  # the size was recorded before the cut
            assert f"{len(whole) - length} bytes: it has {length}, and was written with {len(whole)}" in message
        assert "older checkpoint" in message
    path.write_bytes(whole)
    assert_same(halfstep.load(path), SMALL)


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save(SMALL, path)
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as writable:
        for position, byte in enumerate(whole):
            for bit in range(8) if position > len(whole) - 150 else [position % 8]:  # the archive's end and the seal
                os.pwrite(writable.fileno(), bytes([byte ^ 1 << bit]), position)
                with pytest.raises(CheckpointError):
                    halfstep.load(path)
            os.pwrite(writable.fileno(), bytes([byte]), position)
    assert_same(halfstep.load(path), SMALL)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert f"damaged: it has all of its {len(whole)} bytes, but not those that were written" in refused(path)


def test_bytes_added_or_taken_from_the_middle_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save(SMALL, path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\n")
    assert f"has 1 too many bytes: it has {len(whole) + 1}, and was written with {len(whole)}" in refused(path)
    path.write_bytes(whole[:300] + whole[400:])
    assert f"cut short by 100 bytes: it has {len(whole) - 100}, and was written with {len(whole)}" in refused(path)
    path.write_bytes(whole[:300] + bytes(100) + whole[400:])
    assert "damaged" in refused(path)
    path.write_bytes(whole[-122:])
    assert f"was written with {len(whole)}" in refused(path)


def sealed(archive: bytes, version: int = 1) -> bytes:
    """The format as its description has it, written a second time."""
    start = archive[:-2] + (122).to_bytes(2, "little")
    start += f"halfstep checkpoint {version}: {len(archive) + 122:020d} bytes, sha256 ".encode()
    return start + hashlib.sha256(start).hexdigest().encode()


def of_torch(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_the_file_is_the_archive_of_torch_with_a_seal(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save(SMALL, path)
    assert path.read_bytes() == sealed(of_torch(SMALL))
    for options in ({}, {"mmap": True}):
        assert_same(torch.load(path, weights_only=True, **options), SMALL)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"halfstep checkpoint 1: ")


class Malice:
    """Unpickled with code, this leaves a file behind."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_a_malicious_file_runs_nothing_even_with_a_right_seal(tmp_path: Path) -> None:
    path, witness = tmp_path / "run.pt", tmp_path / "witness"
    path.write_bytes(sealed(of_torch({"w": torch.ones(1), "x": Malice(witness)})))
    assert "run code" in refused(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)  # the file is as malicious as it should be
    assert witness.exists()


def altered(entries: Callable[[dict[str, bytes]], None]) -> bytes:
    """An archive of torch.save with its entries changed, with a right seal."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(of_torch(SMALL))) as archive:
        held = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    entries(held)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in held.items():
            archive.writestr(f"archive/{name}", data)
    return sealed(buffer.getvalue())


#: What is wrong inside a file whose checksum is right.
MALFORMED: list[tuple[str, Callable[[dict[str, bytes]], object]]] = [
    ("no data", lambda held: held.pop("data/0")),
    ("data cut short", lambda held: held.update({"data/0": held["data/0"][:4]})),
    ("no pickle", lambda held: held.pop("data.pkl")),
    ("pickle empty", lambda held: held.update({"data.pkl": b""})),
    ("pickle cut short", lambda held: held.update({"data.pkl": held["data.pkl"][:-20]})),
    ("pickle pops too much", lambda held: held.update({"data.pkl": b"\x80\x020."})),
    ("pickle of nothing", lambda held: held.update({"data.pkl": b"\x80\x02."})),
    ("pickle asks for what was never there", lambda held: held.update({"data.pkl": b"\x80\x02h\x05."})),
    ("pickle sets an item of a number", lambda held: held.update({"data.pkl": b"\x80\x02K\x01K\x01K\x01s."})),
    ("text that is none", lambda held: held.update({"data.pkl": b"\x80\x02X\x02\x00\x00\x00\xff\xff."})),
    ("storage of no kind", lambda held: held.update({"data.pkl": b"\x80\x02K\x01Q."})),
    ("byte order unknown", lambda held: held.update({"byteorder": b"middle"})),
    ("strides beyond the end", lambda held: held.update({"data.pkl": held["data.pkl"].replace(b"K\x05", b"K\x7f")})),
]


@pytest.mark.parametrize(("what", "change"), MALFORMED, ids=[what for what, _ in MALFORMED])
def test_a_file_that_is_malformed_under_a_right_seal_is_refused(what: str, change: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(altered(lambda held: None))
    assert_same(halfstep.load(path), SMALL)
    path.write_bytes(altered(change))
    said = refused(path)
    assert "is whole, but" in said and "do not trust this one" in said


def test_a_device_that_is_not_here_is_named_as_a_possible_reason(tmp_path: Path) -> None:
    halfstep.save(SMALL, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="or map_location='xpu:77' cannot be served here"):
        halfstep.load(tmp_path / "run.pt", map_location="xpu:77")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/a\0b", f"{tmp_path}/\ud800"):
        for use in (lambda name: halfstep.save(SMALL, name), halfstep.load):
            with pytest.raises(CheckpointError, match="no file can have such a name: give another"):
                use(name)
    assert not list(tmp_path.iterdir())


def test_other_files_are_named_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    assert "No such file" in refused(path)
    assert "is a folder" in refused(tmp_path)
    torch.save(SMALL, path)
    assert "torch.load(path, weights_only=True) reads it" in refused(path)
    torch.save(SMALL, path, _use_new_zipfile_serialization=False)
    assert "is not a checkpoint" in refused(path)
    path.write_text("hello")
    assert "is not a checkpoint: it has 5 bytes, and begins with b'hell'" in refused(path)
    path.write_bytes(sealed(of_torch(SMALL), version=2))
    assert "checkpoint format 2, this halfstep reads 1: update halfstep" in refused(path)
    path.write_bytes(sealed(of_torch(SMALL)))
    assert_same(halfstep.load(path), SMALL)
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in refused(path)  # and does not wait for somebody to write to it


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads and writes everything")
def test_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save(1, path)
    path.chmod(0)
    assert "Permission denied" in refused(path)
    path.chmod(0o600)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*get permission"):
            halfstep.save(2, path)
        assert halfstep.load(path) == 1
    finally:
        tmp_path.chmod(0o700)


# --- writing ---


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory.*create the folder") as caught:
        halfstep.save(1, tmp_path / "no" / "run.pt")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(CheckpointError, match="is a folder"):
        halfstep.save(1, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        halfstep.save(1, tmp_path / "pipe")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / ("long" * 60 + ".pt"), tmp_path / "latest.pt"
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        halfstep.save(1, link)
        assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
        real.chmod(0o600)
        halfstep.save(2, link)
    finally:
        os.umask(before)
    assert real.stat().st_mode & 0o777 == 0o600 and halfstep.load(link) == 2


@linux
def test_the_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "run.pt", os.fsync
    halfstep.save("the old one", path)
    synced: list[tuple[str, str]] = []

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        content = "" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else halfstep.load(f"/proc/self/fd/{descriptor}")
        synced.append((content, halfstep.load(path)))

    monkeypatch.setattr(os, "fsync", watched)
    halfstep.save("the new one", path)
    assert synced == [("the new one", "the old one"), ("", "the new one")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@linux
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, new = tmp_path / "run.pt", {"w": torch.ones(1_000_000)}
    halfstep.save(new, path)
    size = path.stat().st_size
    halfstep.save("the old one", path)
    for limit in (0, 1, 100_000, 3_000_000, size - 1):
        with largest_file(limit), pytest.raises(CheckpointError, match="File too large") as caught:
            halfstep.save(new, path)
        assert isinstance(caught.value.__cause__, OSError) and "allow larger files" in str(caught.value)
        assert halfstep.load(path) == "the old one" and len(list(tmp_path.iterdir())) == 1
    with largest_file(size):
        halfstep.save(new, path)
    assert_same(halfstep.load(path), new)


KILLED_BY_ITS_OWN_WRITE = """
import os, resource, signal, sys, torch, halfstep
path, state = sys.argv[1], {"w": torch.ones(1_000_000)}
for limit in (1, 100_000, 3_000_000, 4_000_000):
    if os.fork() == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process at this byte
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        halfstep.save(state, path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
SAVES_FOR_EVER = """
import sys, torch, halfstep
number = 0
while True:
    number += 1
    halfstep.save({"number": number, "w": torch.full((8_000_000,), float(number))}, sys.argv[1])
"""


def environment() -> dict[str, str]:
    source = str(Path(halfstep.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@linux
def test_a_process_that_dies_at_a_byte_of_the_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save("the old one", path)
    command = [sys.executable, "-c", KILLED_BY_ITS_OWN_WRITE, str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGXFSZ)] * 4
    assert halfstep.load(path) == "the old one"
    # The next save to the same file removed what each of the first three left; ours removes the last.
    left = [entry for entry in tmp_path.iterdir() if entry != path]
    assert [entry.stat().st_size for entry in left] == [4_000_000]
    (tmp_path / ".run.pt.mine.tmp").touch()
    halfstep.save("the new one", path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".run.pt.mine.tmp", "run.pt"]


@linux
def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    halfstep.save({"number": 0, "w": torch.zeros(8_000_000)}, path)
    with subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(path)], env=environment()) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2:  # until it is in the middle of a write
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    loaded = halfstep.load(path)
    assert torch.equal(loaded["w"], torch.full((8_000_000,), float(loaded["number"])))


@linux
def test_the_file_of_a_living_writer_is_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with file._temporary(path) as (_, temporary):
        halfstep.save(1, path)
        assert temporary.exists()
    assert not temporary.exists() and halfstep.load(path) == 1


@linux
@pytest.mark.parametrize("names", [("run.pt", "run.pt"), ("r" * 45 + "-0.pt", "r" * 45 + "-1.pt")])
def test_a_save_goes_on_when_another_takes_its_new_file_for_a_leftover(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between making a file and locking it: another process's save holds the lock, and removes it."""
    real, seen = file._lock, []

    def lock(opened: Any) -> Any:
        if not seen:
            seen.extend(path for path in tmp_path.iterdir() if path.name.endswith(".tmp"))
            with seen[0].open("r+b") as theirs:
                assert real(theirs) is file._Lock.OURS
                answer = real(opened)
                file._remove_leftovers(tmp_path / names[1])  # by another descriptor, which does not hold the lock
                seen[0].unlink()
                return answer
        return real(opened)

    monkeypatch.setattr(file, "_lock", lock)
    halfstep.save(SMALL, tmp_path / names[0])
    assert_same(halfstep.load(tmp_path / names[0]), SMALL)
    assert seen and [path.name for path in tmp_path.iterdir()] == [names[0]]


@linux
def test_a_lock_that_another_holds_is_told_from_a_file_system_without_locks(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as first, (tmp_path / "a").open("r+b") as second:
        assert file._lock(first) is file._Lock.OURS
        assert file._lock(second) is file._Lock.ANOTHERS


def test_without_file_locks_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_HAS_LOCKS", False)
    path, other = tmp_path / "run.pt", tmp_path / ".run.pt.01234567.tmp"
    other.touch()
    halfstep.save(SMALL, path)
    assert_same(halfstep.load(path), SMALL)
    assert other.exists() and len(list(tmp_path.iterdir())) == 2


PEAKS = """
import sys, torch, halfstep

def resident(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

big = torch.ones(16_000_000)
state = {"a": big[:4_000_000], "b": big[4_000_000:].view(4000, 3000).T, "c": torch.ones(16_000_000)}
halfstep.save(1, sys.argv[1] + ".first")
halfstep.load(sys.argv[1] + ".first")
now = resident("VmRSS")
halfstep.save(state, sys.argv[1])
print(resident("VmHWM") - now)
del state, big
now = resident("VmRSS")
halfstep.load(sys.argv[1])
print(resident("VmHWM") - now)
"""


@linux
def test_memory_holds_no_second_copy(tmp_path: Path) -> None:
    size = 4 * 32_000_000
    command = [sys.executable, "-c", PEAKS, str(tmp_path / "run.pt")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    while_saving, while_loading = map(int, done.stdout.split())
    assert while_saving < 0.1 * size
    assert 0.9 * size < while_loading < 1.1 * size
