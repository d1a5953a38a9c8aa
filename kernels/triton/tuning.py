"""Block shapes of the kernels: static tables, since autotuning needs a driver and would make two runs differ.

``benchmarks.gpu`` times the candidates on a GPU; what it finds is to be written here.
"""

# block: rows of a map in a program; all kernels that leave partial sums of a cell cut its maps alike. Of the matrix
# products: k, taps times channels in a step; warps and stages. programs: that a sum over all rows is cut into.
KNOBS = {
    "block": 128,
    "fwd_k": 64, "fwd_warps": 4, "fwd_stages": 1,
    "dgrad_k": 32, "dgrad_warps": 4, "dgrad_stages": 1,
    "wgrad_sums": 8192, "wgrad_block": 64, "wgrad_warps": 4, "wgrad_stages": 1,
    "programs": 1024,
}  # fmt: skip
CANDIDATES = {
    "block": (64, 128, 256),
    "fwd_k": (32, 64, 128), "fwd_warps": (2, 4, 8), "fwd_stages": (1, 2, 3),
    "dgrad_k": (32, 64, 128), "dgrad_warps": (2, 4, 8), "dgrad_stages": (1, 2, 3),
    "wgrad_sums": (2048, 4096, 8192), "wgrad_block": (32, 64, 128), "wgrad_warps": (4, 8), "wgrad_stages": (1, 2, 3),
    "programs": (512, 1024, 2048),
}  # fmt: skip


def block() -> int:
    return KNOBS["block"]


def tiles(rows: int) -> int:
    return -(-rows // block())


def elementwise(wide: int, size: int) -> dict:
    """wide: channels of a block, padded; size: bytes of one. More warps before the registers are full."""
    return {"num_warps": 8 if wide * size >= 64 else 4}


def state_gradient(wide: int, size: int, stride: int) -> dict:
    """Of a state's slices. At stride 2 tiles are half as large: there are the indices of maxima to be held."""
    if stride == 2:
        return {"BLOCK": block() // 2, "num_warps": max(4, wide * size // 8)}
    return {"BLOCK": block(), "num_warps": 8 if wide * size >= 32 else 4}


def convolution(wide_in: int, wide_out: int, precision: str, size: int) -> dict:
    """wide_in, wide_out: columns of the two operands, powers of two. precision: of float32, ``ieee`` or ``tf32``. size:
    bytes of an element. Exact float32 takes no tensor cores, and four times the registers."""
    exact = size == 4 and precision == "ieee"
    warps = 8 if exact or wide_out * size >= (128 if size == 4 else 256) else KNOBS["fwd_warps"]
    k = KNOBS["fwd_k"] if size == 2 else 32
    return {"BLOCK_K": k, "num_warps": warps, "num_stages": KNOBS["fwd_stages"]}


def data_gradient(wide_in: int, wide_out: int, precision: str, size: int) -> dict:
    # a step over one tap, or over part of one, where that is wide enough: then the compiler sees runs of channels
    k, columns = KNOBS["dgrad_k"] if size == 2 else 16, min(wide_in, 64)
    exact = size == 4 and precision == "ieee"
    warps = 8 if columns == 64 or (exact and wide_out >= 128) else KNOBS["dgrad_warps"]
    return {
        "BLOCK_K": wide_out if 16 <= wide_out <= k else k, "COLUMNS": columns, "num_warps": warps,
        "num_stages": KNOBS["dgrad_stages"],
    }  # fmt: skip


def weight_gradient(wide_in: int, wide_out: int, precision: str, size: int) -> dict:
    # a program holds BLOCK_K x wide_out sums: 64 registers a thread at 8192 and 4 warps
    exact = size == 4 and precision == "ieee"
    sums = KNOBS["wgrad_sums"] // (1 if size == 2 else 4 if exact else 2)
    return {
        "BLOCK": 32 if exact else KNOBS["wgrad_block"], "BLOCK_K": max(16, min(128, max(wide_in, sums // wide_out))),
        "num_warps": 8 if size == 4 else KNOBS["wgrad_warps"], "num_stages": KNOBS["wgrad_stages"],
    }  # fmt: skip


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


def pointwise(summed: int, wide: int, precision: str, size: int) -> dict:
    """summed, wide: channels that a product sums over, and that it makes. A row is read anew for each block of them."""
    exact = size == 4 and precision == "ieee"
    most = 64 if exact else 128
    whole = max(16, 1 << (wide - 1).bit_length())
    found = whole if whole <= most else columns(wide, 64)
    return {
        "BLOCK": 64 if size == 4 else 128, "BLOCK_K": max(16, columns(summed, 16 if size == 4 else 32)),
        "COLUMNS": found, "num_warps": 8 if found == 128 or (exact and found == 64) else 4, "num_stages": 1,
    }  # fmt: skip


def pointwise_weight_gradient(outputs: int, inputs: int, precision: str, size: int) -> dict:
    exact = size == 4 and precision == "ieee"
    most = 32 if exact else 64
    return {
        "BLOCK": 32 if size == 4 else 64, "OUTPUTS": max(16, columns(outputs, most)),
        "INPUTS": max(16, columns(inputs, most)), "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
