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


def convolution(wide_in: int, wide_out: int) -> dict:
    """wide_in, wide_out: columns of the two operands, powers of two."""
    warps = max(KNOBS["fwd_warps"], 8 if wide_out >= 128 else 1)  # or else the sums do not fit the registers
    return {"BLOCK_K": KNOBS["fwd_k"], "num_warps": warps, "num_stages": KNOBS["fwd_stages"]}


def data_gradient(wide_in: int, wide_out: int) -> dict:
    # a step over one tap, or over part of one, where that is wide enough: then the compiler sees runs of channels
    return {
        "BLOCK_K": wide_out if 16 <= wide_out <= KNOBS["dgrad_k"] else KNOBS["dgrad_k"], "COLUMNS": min(wide_in, 64),
        "num_warps": KNOBS["dgrad_warps"], "num_stages": KNOBS["dgrad_stages"],
    }  # fmt: skip


def weight_gradient(wide_in: int, wide_out: int) -> dict:
    # a program holds BLOCK_K x wide_out sums: 64 registers a thread at 8192 and 4 warps
    return {
        "BLOCK": KNOBS["wgrad_block"], "BLOCK_K": max(16, min(128, max(wide_in, KNOBS["wgrad_sums"] // wide_out))),
        "num_warps": KNOBS["wgrad_warps"], "num_stages": KNOBS["wgrad_stages"],
    }  # fmt: skip
