"""Block shapes of the kernels: static tables, since autotuning needs a driver and would make two runs differ.

BLOCK: rows of a map in a program. BLOCK_K: taps times channels in a step of a matrix product. COLUMNS: input channels in
a program of the data gradient.
"""

STATISTICS_BLOCK = 128  # all kernels that leave partial sums of a cell cut its maps alike
PROGRAMS = 1024  # that a sum over all rows is cut into, to fill the chip


def convolution(wide_in: int, wide_out: int) -> dict:
    """wide_in, wide_out: columns of the two operands, powers of two."""
    return {"BLOCK_K": min(max(wide_in, 32), 64), "num_warps": 8 if wide_out >= 128 else 4, "num_stages": 2}


def data_gradient(wide_in: int, wide_out: int) -> dict:
    return {"BLOCK_K": min(max(wide_out, 32), 64), "COLUMNS": min(wide_in, 64), "num_warps": 4, "num_stages": 2}


def weight_gradient(wide_in: int, wide_out: int) -> dict:
    # a program holds BLOCK_K x wide_out sums: 64 registers a thread at 8192
    return {"BLOCK": 64, "BLOCK_K": min(128, max(wide_in, 8192 // wide_out)), "num_warps": 4, "num_stages": 2}


ELEMENTWISE = {"num_warps": 4}
