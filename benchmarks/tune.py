"""Block shapes of the search's matrix products, timed on the GPU at hand: what ``kernels/triton/tuning.py`` is to hold.

Every launch of a weight step and of an architecture step (CIFAR-10, batch 256, both paths, bfloat16) is repeated as it
was, with other steps of the sum, warps and stages of the pipeline, and stages of stride 1 (``rows.py``) with other
blocks. All of these are compiled before, on all cores.
"""

import itertools
import statistics

import torch
from fpdarts.kernels.triton.launch import pieces
from fpdarts.kernels.triton.rows import rows_tiles, wgrad_grid

from benchmarks import aot

# Only what leaves grids and buffers as they are, but for the rows_* kernels, see _reshaped.
_ROWS = {"BLOCK": (32, 64, 128), "TALL": (1, 2, 4, 8), "WIDE": (16, 32, 64), "num_warps": (1, 2, 4)}
CANDIDATES = {
    "rows_fwd_kernel": _ROWS,
    "rows_dgrad_kernel": _ROWS,
    "rows_wgrad_kernel": _ROWS,
    "convolve_fwd_kernel": {"BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "convolve_dgrad_kernel": {"BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "convolve_wgrad_kernel": {"BLOCK": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    "state_bwd_kernel": {"num_warps": (2, 4, 8, 16)},
    "pool_fwd_kernel": {"num_warps": (2, 4, 8)},
    "node_fwd_kernel": {"num_warps": (2, 4, 8)},
    "node_reduce_kernel": {"num_warps": (2, 4, 8)},
    "draw_kernel": {"num_warps": (2, 4, 8)},
}


def variants(launch) -> list:
    """The launch with each choice of options."""
    options, found = CANDIDATES[launch.kernel.fn.__name__], []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        if options is not _ROWS:
            found.append(launch._replace(arguments=launch.arguments | chosen))
        elif _sensible(launch, **chosen):
            found.append(_reshaped(launch, chosen))
    return found or [launch]


def _sensible(launch, BLOCK, TALL, WIDE, num_warps) -> bool:
    """Whether a thread's part of the sums, of what is loaded and of the rows of a warp is one that can be fast."""
    name, given = launch.kernel.fn.__name__, launch.arguments
    wide, threads = max(16, given["P"]), 32 * num_warps
    columns = max(16, given["EDGES"] * given["P"])
    if not 16 <= BLOCK // num_warps <= 64 or given["EDGES"] == 2:  # two edges are between one and four
        return False
    if name == "rows_wgrad_kernel":
        sums, loaded = 5 * columns * WIDE / threads, TALL * BLOCK * columns / 2 / threads
        return WIDE in (wide, 2 * wide) and 20 <= sums <= 168 and loaded <= 64 and TALL in (2, 4)
    if name == "rows_dgrad_kernel":
        sums = TALL * BLOCK * given["P"] / threads
        return WIDE == min(32, columns) and TALL > 2 and 8 <= sums <= 128
    return WIDE == wide and TALL > 1 and 32 <= TALL * BLOCK * given["EDGES"] * given["P"] / threads <= 128


def _reshaped(launch, options):
    """With other tiles: another grid, and a buffer for the shares that as many programs leave."""
    given = {key: value for key, value in launch.arguments.items() if key != "maxnreg"} | options
    size = tuple(pieces(given[side], given.get("STRIDE", 1)) for side in "HW")
    tiles, grid = rows_tiles(given["IMAGES"], size, given), launch.grid
    if launch.kernel.fn.__name__ == "rows_wgrad_kernel":
        grid = wgrad_grid(tiles, grid[1], given["C"], 5, given)
        elements = grid[0] * given["DISTANCE"]
    else:  # a share of three numbers at most, of each instance and channel
        grid, elements = (tiles, *grid[1:]), launch.tensors["opened_ptr"].numel() * tiles * 3 * given["C"]
        if "SHARES" in given:
            given["SHARES"] = tiles
    partial = torch.empty(elements, device=launch.tensors["x_ptr"].device)
    return launch._replace(grid=grid, arguments=given, tensors=launch.tensors | {"partial_ptr": partial})


def distinct(launches) -> dict[str, list]:
    """[launch, how often] of each configuration that can be tuned, by what tells it apart."""
    found = {}
    for launch in launches:
        if launch.kernel.fn.__name__ in CANDIDATES:
            told = f"{launch.kernel.fn.__name__} {launch.grid}"
            if hasattr(launch.kernel, "params"):  # the interpreter's have none
                told += f" {aot.told(aot.specialized(launch)[1])}"
            found.setdefault(told, [launch, 0])[1] += 1
    return found


def jobs() -> list[dict]:
    """All that is to be compiled, found on the meta device."""
    options = aot.Options(dtypes=("bfloat16",), partial=(2,))
    found = {}
    for launch, _ in distinct(aot.searched("cifar", torch.bfloat16, options)).values():
        for variant in variants(launch):
            key, job = aot.specialized(variant)
            found[key] = job | {"dtype": "bfloat16"}
    return list(found.values())


def tune(device: str = "cuda", rounds: int = 9, dry_run: bool = False) -> dict:
    """{"rows": [{"told", "calls", "seconds": a call as it is, "best", "best_seconds", "times": {options: s}}]}."""
    from fpdarts.kernels.triton.launch import counting

    from benchmarks.cases import Setting, build
    from benchmarks.sides import Side

    if not dry_run:
        errors = aot.compile_all(jobs())
        print(f"{len(errors)} do not compile: {errors[:3]}", flush=True)
    sizes = dict(batch_size=2, init_channels=4, cells=1, image_size=4) if dry_run else dict(batch_size=256)
    launches = []
    for what in ("search-step", "arch-step"):
        case = build(what, Side("triton", bf16=not dry_run), Setting(**sizes, device=device))
        case.step(0)
        with counting() as launched:
            case.step(1)
        launches += launched.all
    rows, total, best_total = [], 0.0, 0.0
    for told, (launch, calls) in distinct(launches).items():
        options, times = CANDIDATES[launch.kernel.fn.__name__], {}
        now = _seconds(launch, device, rounds)
        for variant in variants(launch)[: 1 if dry_run else None]:
            name = " ".join(f"{option}={variant.arguments[option]}" for option in options)
            try:
                times[name] = _seconds(variant, device, rounds)
            except Exception as error:  # shapes that the chip cannot hold
                print(f"{told}: {name}: {type(error).__name__}", flush=True)
        best = min(times, key=times.get)
        rows.append(
            {"told": told, "calls": calls, "seconds": now, "best": best, "best_seconds": times[best], "times": times}
        )
        total, best_total = total + calls * now, best_total + calls * min(now, times[best])
        print(f"{calls:3d} x {now * 1e6:7.1f} -> {times[best] * 1e6:7.1f} us {best}: {told}", flush=True)
    print(f"in all {total * 1e3:.2f} ms, at best {best_total * 1e3:.2f} ms")
    return {"rows": rows}


def _seconds(launch, device: str, rounds: int) -> float:
    def once():
        launch.kernel[launch.grid](**launch.tensors, **launch.arguments)

    if device == "cpu":
        once()
        return 0.0
    times = []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if i == 2:  # warm
            times.clear()
        torch.cuda._sleep(500_000)  # cycles, in which the CPU gets ahead: its part of a launch is not to be timed
        start.record()
        once()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
