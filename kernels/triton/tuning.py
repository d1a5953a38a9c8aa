"""Block shapes of the kernels: static rules, since autotuning needs a driver and would make two runs differ.

Those of the search in bfloat16 were timed on an H100 (``benchmarks.tune``), but for the kernels of rows.py, of nodes
and of poolings, and for pipelines of two stages; the others are chosen by what fits. What ``benchmarks.tune`` finds
faster goes into timed.py, and comes before the rules here on a chip of that kind.
"""

from collections.abc import Callable
from functools import wraps

import triton

from .launch import SINCE_3_7, chip, in_tensor_memory
from .timed import CHIP, TIMED

# block: rows of a map in a program. programs: that a sum over all rows is cut into. merged: shares of sums, times
# channels, that a program adds up at a time.
KNOBS = {"block": 128, "programs": 1024, "merged": 4096}
# Newer assemblers take fewer registers than they need if more programs then fit, and spill.
NEWER = SINCE_3_7.value


def others() -> bool:
    """Than sm_80 and sm_90, for which shapes were chosen: on these more spill."""
    return chip() not in (80, 90)


def on_blackwell() -> bool:
    return chip() >= 100


def block() -> int:
    return KNOBS["block"]


def tiles(rows: int) -> int:
    return -(-rows // block())


def timed(rule: Callable[..., dict]) -> Callable[..., dict]:
    """The rule, but for arguments that timed.py knows better. They are given by position; what a rule does not use
    itself tells choices there apart."""

    @wraps(rule)
    def choose(*arguments):
        options, faster = rule(*arguments), TIMED.get((rule.__name__, *arguments))
        if faster and chip() == CHIP:
            options |= faster
        return {name: value for name, value in options.items() if value is not None}

    return choose


@timed
def node(wide: int, k: int, size: int) -> dict:
    """wide: channels of a slice, padded; all k slices are a program's. One warp waits for no other."""
    return {"BLOCK": max(16, 2048 // (wide * triton.next_power_of_2(k))), "num_warps": 1}


@timed
def reducing(wide: int, size: int) -> dict:
    """Of sums over a node: a thread has 16 bytes of two rows, if a row has so many."""
    return {"BLOCK": 256 * min(16 // size, wide) // wide, "num_warps": 4}


@timed
def normalize_backward(wide: int, size: int) -> dict:
    return {"num_warps": 2 if wide <= 16 else 4}


@timed
def pooling(wide: int, size: int, stride: int) -> dict:
    """BLOCK columns of TALL rows; a thread has 8 elements of each. In float32 the compiler takes too few registers at
    stride 1 and spills, on sm_80; at stride 2 it does so where 255 are said."""
    options = {"BLOCK": max(8, 256 // wide), "TALL": 4, "num_warps": max(1, wide // 32)}
    return options | ({"maxnreg": 255} if size == 4 and stride == 1 else {})


@timed
def state_gradient(wide: int, size: int, stride: int) -> dict:
    """Of a state's slices: a thread has 16 bytes of TALL rows. At stride 2 taps are gathered one by one. Registers are
    said where compilers take fewer than it needs."""
    warps = max(1, wide * size // 16)
    if stride == 2:
        return {"BLOCK": block() // 2, "TALL": 1, "num_warps": max(4, 2 * warps), "maxnreg": 128}
    tall = 2 if NEWER and size == 2 and wide >= 16 and chip() >= 90 else 4  # with 4 some spill there
    options = {"BLOCK": 32, "TALL": tall, "num_warps": warps}
    return options | ({"maxnreg": 255} if size == 4 else {})


@timed
def convolution(wide_in: int, wide_out: int, width: int, precision: str, size: int) -> dict:
    """wide_in, wide_out: columns of the two operands, powers of two. width: of the map that is read. precision: of
    float32, ``ieee`` or ``tf32``. size: bytes of an element. Exact float32 takes no tensor cores, and four times the
    registers."""
    exact = size == 4 and precision == "ieee"
    if size == 2 and wide_in <= 16:
        # With 2 warps the compiler takes the smaller matrix instructions, which are faster here, until it spills.
        k = 32 if wide_in == 16 and wide_out == 32 else 16
        return {"BLOCK_K": k, "num_warps": 2 if wide_in <= 8 or wide_out <= 16 else 4, "num_stages": 2}
    k = 32 if size == 4 or wide_in == 32 else 64
    if size == 2 and wide_in == 32 and wide_out == 128 and (NEWER or width & (width - 1)):
        k = 16  # places in such a map take the registers that a wider block has not left, on sm_80
    wide = exact or wide_out * size >= (128 if size == 4 else 256 if in_tensor_memory() else 512)
    return {"BLOCK_K": k, "num_warps": 8 if wide else 4, "num_stages": 2 if size == 2 and wide_in == 32 else 1}


@timed
def data_gradient(wide_in: int, wide_out: int, stride: int, precision: str, size: int) -> dict:
    # a step over one tap, or over part of one, where that is wide enough: then the compiler sees runs of channels
    columns, exact = min(wide_in, 64), size == 4 and precision == "ieee"
    warps, stages, k = 8 if columns == 64 or (exact and wide_out >= 128) else 4, 1, 32 if size == 2 else 16
    if size == 2 and columns <= 32 and (stride == 2 or columns == 32):
        k, stages = 32 if columns <= 16 else 64, 2
    elif size == 2 and columns <= 16:
        k, warps = 16, 4 if wide_in == 8 and wide_out == 32 else 2
    elif exact and columns == 16:  # here and below, other numbers of warps spill
        warps = 8 if wide_out > 16 else 4
    elif size == 4 and not exact and wide_out == 8:
        warps = 8
    whole = 16 <= wide_out <= k and stages == 1
    options = {"BLOCK_K": wide_out if whole else k, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    return options | ({"maxnreg": 128} if size == 2 and columns == 64 and in_tensor_memory() else {})


@timed
def weight_gradient(wide_in: int, wide_out: int, precision: str, size: int) -> dict:
    # a program holds BLOCK_K x wide_out sums: 64 registers a thread at 8192 and 4 warps
    exact = size == 4 and precision == "ieee"
    sums = 8192 // (1 if size == 2 else 4 if exact else 2)
    return {
        "BLOCK": 128 if size == 2 else 32 if exact or wide_in == 32 else 64,
        "BLOCK_K": max(16, min(128, max(wide_in, sums // wide_out))), "num_warps": 8 if size == 4 else 4,
        "num_stages": 1,
    }  # fmt: skip


# --- Of the kernels of rows.py: BLOCK columns of ACROSS pixels and TALL rows of a map, WIDE elements of what is summed
# at a time. Chosen by what the compiler made of them: instructions and passes through the first-level cache, eight
# warps that fit, no spills; to be timed. Products of 64 rows by 4 warps are on sm_90 those of a group of warps, which
# reads what it multiplies from shared memory anew for each tap; warps with smaller ones keep it. With two stages the
# rows of the next chunk are copied while one is multiplied, all at a time; with one, as mostly in float32, where two
# spill, each waits for the one before it. The number of registers is said where the compiler chooses fewer than it
# needs; for newer ones blocks are smaller as well.


def _rows(
    block: int, tall: int, wide: int, warps: int, registers: int | None = None, stages: int = 2, across: int = 1
) -> dict:  # fmt: skip
    options = {"BLOCK": block, "TALL": tall, "WIDE": wide, "ACROSS": across, "num_warps": warps, "num_stages": stages}
    return options | ({} if registers is None else {"maxnreg": registers})


def in_registers(rule: Callable[..., dict]) -> Callable[..., dict]:
    """The rule, but where its tiles would have their sums in tensor memory, with half of one, and as much a thread."""

    @wraps(rule)
    def choose(*arguments):
        options = rule(*arguments)
        if options["BLOCK"] >= 64 and options["num_warps"] >= 4 and in_tensor_memory():
            options |= {"BLOCK": options["BLOCK"] // 2, "num_warps": options["num_warps"] // 2}
        return options

    return choose


def in_pairs(width: int) -> bool:
    """Whether outputs can stand side by side: pairs of pairs are to fill a map's width, see rows.first_of."""
    return width % 4 == 0


@timed
@in_registers
def rows_forward(wide: int, columns: int, width: int, precision: str, size: int) -> dict:
    """wide: channels of a slice, columns: of all edges of a job; powers of two. width: of the map."""
    blackwell = on_blackwell()
    if size == 4 and precision == "ieee":
        tall, registers = (2, None) if wide < columns <= max(16, 2 * wide) <= 32 and not blackwell else (1, 255)
        return _rows(32, tall, 16, 4 if columns < 128 else 8, registers, 1)
    if size == 4:
        if columns <= 32 and wide < 32:
            return _rows(32, 1 if columns == 8 else 2, 16, 2, 255, stages=1)
        tall = 2 if columns <= 64 and wide < 64 and columns // wide != 2 else 1
        return _rows(32, tall, 16, 4 if columns < 128 else 8, 255, stages=1)
    if columns <= 8:
        return _rows(32, 8, 16, 2, across=2) if wide == 8 and in_pairs(width) else _rows(16, 8, 16, 1)
    if wide <= 8 and columns <= 32:
        return _rows(64, 4 if width % 16 or blackwell else 8, 16, 4) if columns == 32 else _rows(32, 8, 16, 2)
    if columns <= 32 and wide < 32:
        if columns > wide:
            return _rows(32, 4, 16, 2)
        return _rows(32, 8, 16, 2, 200) if NEWER else _rows(32, 16 if width % 16 == 0 else 8, 16, 2)
    fewer = in_tensor_memory()  # some spill there that elsewhere do not
    if columns == 32:
        return _rows(32, 8, 16, 2) if width % 8 == 0 and columns == wide and not fewer else _rows(64, 4, 16, 4)
    if columns == 64:
        return _rows(64, 4, 16, 4) if wide == 16 and not fewer else _rows(32, 2, 32, 4)
    if columns == 128:
        return _rows(32 if width & (width - 1) or blackwell else 64, 2, 16, 4)
    return _rows(32, 1, 32, 8)


@timed
@in_registers
def rows_data_gradient(wide: int, summed: int, width: int, stride: int, precision: str, size: int) -> dict:
    """summed: channels that a product sums over, of all edges of a segment. width: of the map."""
    columns, blackwell = {"COLUMNS": min(wide, 64)}, on_blackwell()
    if size == 4 and precision == "ieee":
        if wide == summed == 32:
            return columns | _rows(32, 2, 16, 4, stages=1)
        return columns | _rows(32, 1, 16, 8 if blackwell and wide == 32 else 4, 255, 1)
    if size == 4:
        tall = 1 if in_tensor_memory() else 2
        return columns | (_rows(64, tall, 16, 4, 255, 1) if wide >= 32 else _rows(32, 4, 16, 2, 255, 1))
    most = 255 if blackwell else 208
    if wide >= 64:
        return columns | _rows(64, 4, 32, 8)
    if wide == 32:
        if summed == 32:
            return columns | _rows(16, 4 if blackwell else 8, 16, 1)
        return {"COLUMNS": 16} | _rows(32, 4 if blackwell or NEWER and stride == 2 else 8, 32, 2)
    if summed == wide == 8 and in_pairs(width):
        return columns | _rows(32, 8, 16, 2, most, across=2)
    if summed <= 8:
        return columns | _rows(8 * wide, 4, 16, 2, 168 if NEWER else None)
    if summed == wide:
        return columns | _rows(32, 8, 16, 2, most)
    if NEWER:
        if stride == 2 and summed > 16:
            return columns | _rows(32, 4, 32, 2)
        if summed == 64:
            return columns | (_rows(64, 8, 32, 4) if blackwell else _rows(16, 8, 32, 1))
        return columns | _rows(32, 8, min(32, summed), 2, 255 if wide == 8 and summed == 16 else None)
    if blackwell:
        return columns | (_rows(32, 8, min(32, summed), 2, 255) if wide == 8 else _rows(32, 4, min(32, summed), 2))
    return columns | _rows(32, 16 if wide == 8 and width % 32 == 0 else 8, min(32, summed), 2)


@timed
def rows_weight_gradient(wide: int, columns: int, width: int, precision: str, size: int) -> dict:
    if size == 4 and precision == "ieee":
        tall, registers = 1 if columns >= 64 or columns == 32 and others() else 2, 255 if others() else None
        return _rows(16, tall, 16, 8 if columns >= 64 or wide >= 32 else 4, registers, 1)
    if columns > 128:  # wider than the protocols' searches: of larger blocks some do not fit into shared memory
        return _rows(32 if columns <= 512 else 16, 1, 16, 8)
    if size == 4:
        return _rows(16, 2, 16, 2) if columns < 64 else _rows(64, 1, 32 if wide >= 32 else 16, 8)
    tall = 8 if width <= 8 else 16
    if columns > wide >= 8:  # a warp has the gradients of 8 to 16 channels, of all rows of a tile
        if columns == 16:
            return _rows(16, tall, 32, 2, across=2) if in_pairs(width) else _rows(16, tall, 32, 1)
        return _rows(16, tall, 32, columns // 16)
    if wide >= 32:
        return _rows(16, 8, 32, max(2, columns // 16))
    if wide >= 8 and in_pairs(width):
        return _rows(16, tall if wide == 16 or width % 32 == 0 else 8, 32, 2, across=2)
    return _rows(16, 8, 16 if wide < 8 else 32, 2 if wide == 16 else 1)


# --- Of a derived cell, whose maps have more channels than the search's ---


def columns(channels: int, most: int = 64) -> int:
    """Channels of a block: the most that leave no more than a quarter of its lanes idle."""
    size = min(most, 1 << (channels - 1).bit_length())
    while size > 16 and -(-channels // size) * size > 4 / 3 * channels:
        size //= 2
    return size


def derived(channels: int) -> dict:
    """Of kernels that read maps element by element: 32 elements a thread at most, of which some keep four numbers."""
    wide = columns(channels)
    return {"BLOCK": min(block(), 4096 // wide), "COLUMNS": wide, "num_warps": 4}


def depthwise(channels: int, size: int) -> dict:
    """Of BLOCK pixels in TALL rows; a thread has 16 bytes of each row."""
    wide = columns(channels)
    options = {"BLOCK": 2048 // (size * wide), "TALL": 4, "COLUMNS": wide, "num_warps": 4}
    if NEWER and (size == 4 or channels == 192 or on_blackwell()):
        options["maxnreg"] = 255  # left to themselves some spill, on sm_80 or sm_120
    return options


def source_gradient(channels: int, size: int, stride: int) -> dict:
    """Of a derived cell's state. At stride 2 taps are gathered one by one. Left to itself the compiler takes 80 to 168
    registers, and spills."""
    options = derived(channels) | {"TALL": 1, "num_warps": 8 if size == 4 else 4}
    return (options if stride == 2 else depthwise(channels, size)) | {"maxnreg": 255}


def pointwise(summed: int, wide: int, precision: str, size: int) -> dict:
    """summed, wide: channels that a product sums over, and that it makes. A row is read anew for each block of them."""
    exact = size == 4 and precision == "ieee"
    most = 64 if exact else 128
    whole = max(16, 1 << (wide - 1).bit_length())
    found = whole if whole <= most else columns(wide, 64)
    options = {
        "BLOCK": 64 if size == 4 else 128, "BLOCK_K": max(16, columns(summed, 16 if size == 4 else 32)),
        "COLUMNS": found, "num_warps": 8 if found == 128 or (exact and found == 64) else 4,
        "num_stages": 2 if size == 2 or (found >= 64 and not exact) else 1,  # in tf32 such blocks spill with one
    }  # fmt: skip
    if exact and (found == 64 or found == 32 and others()):
        options["maxnreg"] = 128  # the compiler would choose 64 on sm_90, or 96 on sm_89 and sm_120, and spill
    elif size == 4 and found >= 64 and in_tensor_memory():
        options["maxnreg"] = 168  # or 128, and it would spill
    return options


def pointwise_weight_gradient(outputs: int, inputs: int, precision: str, size: int) -> dict:
    exact = size == 4 and precision == "ieee"
    most = 32 if exact else 64
    options = {
        "BLOCK": 32 if size == 4 else 64, "OUTPUTS": max(16, columns(outputs, most)),
        "INPUTS": max(16, columns(inputs, most)), "num_warps": 4, "num_stages": 2 if size == 2 else 1,
    }  # fmt: skip
    if size == 4 and not exact or size == 2 and others():
        options["maxnreg"] = 255  # 208 are used at most; the compiler would choose 162 or 185 for one, and spill
    return options
