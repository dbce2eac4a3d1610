"""What the Triton kernels share: where elements are, dither, and the storage of masters and states.

**Many tensors.** A kernel gets no tensors but a table of addresses (`COLUMNS` int64 for each job) and a list of chunks
(job, first group of 64 elements): a program takes one chunk of one job. All jobs of a launch have the same dtypes,
which are compiled in, so each combination is a kernel of its own, without a branch inside.

**Tiles.** A tile is (GROUPS, 64) elements: one row is a group, which shares an 8-bit state's scale. Where a parameter's
row is no multiple of 64 (RAGGED), its last group is part empty, and places are found by division. ALIGNED says that
addresses and lengths are multiples of 16, so that a thread may load 16 bytes at once.

Storage is that of `halfstep.optim.dither`, `masters` and `moments`, the same bits: integer operations, and
floating-point ones that are exact or rounded as there.

Traps: ``tl.max`` drops NaN, so a maximum is taken over the bits of magnitudes, where NaN is the largest; ``tl.where``
evaluates both sides; dither is arithmetic on uint32, which wraps; there is no rounding to nearest even without a call
into CUDA's library, so `_WHOLE` does it; a Python number takes the type of the tensor it meets.
"""

# Functions of Triton's language are no Python functions: shapes and dtypes are in the docstrings.
# mypy: ignore-errors
# Capitals: what is compiled in. Comparisons and branches are read by Triton, which has its own taste.
# ruff: noqa: N803, SIM108, SIM300

import triton
import triton.language as tl

from halfstep.optim import dither

#: Columns of the table of jobs, one row a job, int64.
COLUMNS = tl.constexpr(16)
PARAMETER = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
KEPT = tl.constexpr(2)
STATES = tl.constexpr(3)
SCALES = tl.constexpr(6)
STEP = tl.constexpr(9)
NUMEL = tl.constexpr(10)
ROW = tl.constexpr(11)
KEYS = tl.constexpr(12)  #: the dither's key for each stream

GROUP = tl.constexpr(64)

_GOLDEN = tl.constexpr(dither.GOLDEN)
_FIRST = tl.constexpr(dither.FIRST)
_SECOND = tl.constexpr(dither.SECOND)
INF = tl.constexpr(0x7F800000)
_QUIET_NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_TINY = tl.constexpr(0x00800000)  # the bits of 2^-126
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to a whole number, half to even.
_WHOLE = tl.constexpr(12582912.0)


# Addresses ------------------------------------------------------------------------------------------------------------


@triton.jit
def entry(table, job, column):
    return tl.load(table + job * COLUMNS + column)


@triton.jit
def pointer(table, job, column, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    address = entry(table, job, column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def layout(table, job, RAGGED: tl.constexpr, ALIGNED: tl.constexpr):
    """Length, row length, groups in a row, and number of groups of a job; int64 scalars."""
    # Loaded here, not by `entry`: Triton 3.6 forgets a mark of alignment on what a function returned, and without it
    # a thread loads single elements.
    numel = tl.load(table + job * COLUMNS + NUMEL)
    row = tl.load(table + job * COLUMNS + ROW)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
        row = tl.multiple_of(row, 16)
    per_row = (row + GROUP - 1) // GROUP
    groups = (numel + GROUP - 1) // GROUP
    if RAGGED:
        groups = numel // row * per_row
    return numel, row, per_row, groups


@triton.jit
def tile_of(first, numel, row, per_row, groups, GROUPS: tl.constexpr, RAGGED: tl.constexpr):
    """Groups (GROUPS, 1) and elements (GROUPS, 64) of a tile, int64, and which of them there are."""
    group = (first + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
    lane = tl.arange(0, GROUP)[None, :]
    if RAGGED:
        index = group // per_row
        place = (group - index * per_row) * GROUP
        offsets = index * row + place + lane
        inside = (lane < row - place) & (group < groups)
    else:
        offsets = group * GROUP + lane
        inside = offsets < numel
    return group, offsets, group < groups, inside


# Dither ---------------------------------------------------------------------------------------------------------------


@triton.jit
def noise_for(table, job, stream, count, offsets):
    """`halfstep.optim.dither.dither`: uint32 for each element."""
    key = entry(table, job, KEYS + stream).to(tl.uint32)
    x = offsets.to(tl.uint32) * _FIRST + key
    x = (x ^ (x >> 16)) * _SECOND
    return x + count.to(tl.int32).to(tl.uint32) * _GOLDEN


@triton.jit
def _uniform(noise):
    return (noise >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


# Masters --------------------------------------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def value_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _canonical(x):
    bits = bits_of(x)
    return tl.where(x != x, (bits & _SIGN) | _QUIET_NAN, bits)


@triton.jit
def _finite(x):
    return (bits_of(x) & MAGNITUDE) < INF


@triton.jit
def _upper(bits):
    """The upper half of FP32 bits as a bfloat16."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def wide(x):
    """x in FP32: exact; a bfloat16 by its bits, for Triton's interpreter gets subnormal ones wrong."""
    if x.dtype == tl.bfloat16:
        y = value_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in the parameter's dtype, to nearest, half to even; in bf16 by integers, which nobody can simplify away."""
    if dtype == tl.bfloat16:
        bits = _canonical(x)
        y = _upper(bits + 0x7FFF + ((bits >> 16) & 1))
    else:
        y = x.to(dtype)
    return y


@triton.jit
def _unit(parameter, FINE: tl.constexpr):
    """The unit of an fp16 parameter's remainder; FINE: of the int16 one."""
    field = (parameter.to(tl.int16, bitcast=True).to(tl.int32) >> 10) & 0x1F
    exponent = field - 39 if FINE else tl.maximum(field, 1) - 33
    return value_of((exponent + 127) << 23)


@triton.jit
def read_master(parameters, kept, offsets, inside, MASTER: tl.constexpr):
    """`halfstep.optim.masters.decode`. MASTER: the dtype of what is kept, or None."""
    dtype: tl.constexpr = parameters.dtype.element_ty
    parameter = tl.load(parameters + offsets, inside, other=0.0)
    x = wide(parameter)
    if MASTER is not None:
        beside = tl.load(kept + offsets, inside, other=0)
        if MASTER == tl.float32:
            x = tl.where(wide(narrow(beside, dtype)) == x, beside, x)
        elif MASTER == dtype:
            half_spacing: tl.constexpr = 0.00390625 if dtype == tl.bfloat16 else 0.00048828125
            error = wide(beside)
            x = tl.where(tl.abs(error) <= tl.abs(x) * half_spacing, x + error, x)
        elif dtype == tl.float16:
            x = x + beside.to(tl.float32) * _unit(parameter, MASTER == tl.int16)
        else:
            remainder = beside.to(tl.int32) if MASTER == tl.int16 else beside.to(tl.int32) << 8
            upper = bits_of(x)
            bits = upper + remainder
            x = value_of(tl.where((bits ^ upper) < 0, upper, bits))
    return x


@triton.jit
def write_master(x, noise, parameters, kept, offsets, inside, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`halfstep.optim.masters.encode`; noise counts where STOCHASTIC."""
    dtype: tl.constexpr = parameters.dtype.element_ty
    if MASTER == tl.int16 or MASTER == tl.int8:
        if dtype == tl.bfloat16:
            parameter, beside = _split_bf16(x, noise, MASTER, STOCHASTIC)
        else:
            parameter, beside = _split_fp16(x, noise, MASTER, STOCHASTIC)
        tl.store(kept + offsets, beside, inside)
    elif STOCHASTIC and MASTER is None and dtype == tl.bfloat16:
        bits = _canonical(x)
        parameter = _upper(tl.where(_finite(x), bits + (noise >> 16).to(tl.int32), bits))
    elif STOCHASTIC and MASTER is None and dtype == tl.float16:
        parameter = _stochastic_fp16(x, noise).to(tl.float16)
    else:
        parameter = narrow(x, dtype)
        if MASTER == tl.float32:
            tl.store(kept + offsets, x, inside)
        elif MASTER is not None:
            lost = x - wide(parameter)
            tl.store(kept + offsets, narrow(tl.where(_finite(lost), lost, 0.0), dtype), inside)
    tl.store(parameters + offsets, parameter, inside)


@triton.jit
def _floor_or_above(x, noise):
    """Compared, not added: the sum would be rounded before the floor."""
    below = tl.floor(x)
    return below + tl.where(_uniform(noise) < x - below, 1.0, 0.0)


@triton.jit
def _split_bf16(x, noise, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    bits = _canonical(x)
    if MASTER == tl.int8:
        added = (noise >> 24).to(tl.int32) if STOCHASTIC else 0x80
        bits = tl.where(_finite(x), bits + added, bits) & -0x100
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    if MASTER == tl.int8:
        rest = rest >> 8
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True), rest.to(MASTER)


@triton.jit
def _split_fp16(x, noise, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    parameter = x.to(tl.float16)
    lost = x - wide(parameter)
    units = tl.div_rn(tl.where(_finite(lost), lost, 0.0), _unit(parameter, MASTER == tl.int16))
    if MASTER == tl.int8:
        if STOCHASTIC:
            units = _floor_or_above(units, noise)
        else:
            units = (units + _WHOLE) - _WHOLE
        units = tl.minimum(tl.maximum(units, -127.0), 127.0)
    else:
        units = (units + _WHOLE) - _WHOLE
    return parameter, units.to(tl.int32).to(MASTER)


@triton.jit
def _stochastic_fp16(x, noise):
    magnitude = tl.abs(x)
    normal = value_of((_canonical(x) + (noise >> 19).to(tl.int32)) & -0x2000)
    normal = tl.minimum(tl.maximum(normal, -65504.0), 65504.0)
    small = _floor_or_above(magnitude * 16777216.0, noise) * 5.9604644775390625e-08  # 2^24, 2^-24
    small = value_of(bits_of(small) | (bits_of(x) & _SIGN))
    return tl.where(magnitude < 6.103515625e-05, small, tl.where(magnitude < 65520.0, normal, x))


# States ---------------------------------------------------------------------------------------------------------------


@triton.jit
def read_state(codes, scales, offsets, inside, group, exists):
    """`halfstep.optim.moments.decode`: float32 (GROUPS, 64)."""
    dtype: tl.constexpr = codes.dtype.element_ty
    x = wide(tl.load(codes + offsets, inside, other=0))
    if dtype == tl.int8:
        root = tl.div_rn(x, 127.0)
        x = root * tl.abs(root) * tl.load(scales + group, exists, other=0.0)
    elif dtype == tl.uint8:
        root = x * tl.div_rn(tl.load(scales + group, exists, other=0.0), 255.0)
        x = root * root
    return x


@triton.jit
def write_state(x, table, job, stream, count, codes, scales, offsets, inside, group, exists, SQUARE: tl.constexpr):
    """`halfstep.optim.moments.encode`; SQUARE: a mean of squares, which is dithered below FP32."""
    dtype: tl.constexpr = codes.dtype.element_ty
    if dtype == tl.int8 or dtype == tl.uint8:
        noise = noise_for(table, job, stream, count, offsets) if SQUARE else 0
        code, scale = _to_8bit(x, noise, inside, SQUARE)
        tl.store(scales + group, scale, exists)
        tl.store(codes + offsets, code.to(dtype), inside)
    elif SQUARE and dtype == tl.bfloat16:
        bits = _canonical(x)
        moved = bits + (noise_for(table, job, stream, count, offsets) >> 16).to(tl.int32)
        tl.store(codes + offsets, _upper(tl.where(_finite(x), moved, bits)), inside)
    else:
        tl.store(codes + offsets, narrow(x, dtype), inside)


@triton.jit
def _to_8bit(x, noise, inside, SQUARE: tl.constexpr):
    """Codes (GROUPS, 64), int32, and scales (GROUPS, 1)."""
    root = tl.where(inside, tl.sqrt_rn(x) if SQUARE else tl.abs(x), 0.0)
    largest = tl.max(bits_of(root) & MAGNITUDE, axis=1, keep_dims=True)
    scale = value_of(tl.maximum(largest, _TINY))
    relative = root * tl.div_rn(1.0, scale)
    if SQUARE:
        code = tl.floor(relative * 255.0 + _uniform(noise))
        code = tl.minimum(tl.where(code == code, code, 0.0), 255.0)
        code = tl.where(x > 0, tl.maximum(code, 1.0), code)
    else:
        code = tl.sqrt_rn(relative) * 127.0
        code = (tl.where(code == code, code, 0.0) + _WHOLE) - _WHOLE
        code = tl.where(x < 0, -code, code)
    return code.to(tl.int32), scale
