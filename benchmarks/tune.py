"""Block shapes of the search's kernels, timed on the GPU at hand; the fastest go into ``kernels/triton/timed.py``.

Every launch of a weight step and of an architecture step (CIFAR-10, batch 256, both paths, bfloat16) is repeated as it
was, with other steps of the sum, warps and stages of the pipeline, and stages of stride 1 (``rows.py``) with other
blocks. It is part ``tuning`` of ``benchmarks.gpu``, and wants everything compiled before (``benchmarks.precompile``).
"""

import itertools
import re
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from fpdarts.kernels.triton import timed
from fpdarts.kernels.triton.launch import chip, padded, pieces
from fpdarts.kernels.triton.rows import rows_shares, rows_tiles
from fpdarts.kernels.triton.rows_wgrad import wgrad_grid
from fpdarts.kernels.triton.tuning import in_pairs

from benchmarks import aot

WORTH = 0.98  # of the time as it is: what must at least be gained
# Only what leaves grids and buffers as they are, but for nodes and the rows_* kernels, see variants and _reshaped.
_ROWS = {"BLOCK": (16, 32, 64), "TALL": (4, 8, 16), "WIDE": (16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2)}
CANDIDATES = {
    "rows_fwd_kernel": _ROWS | {"ACROSS": (1, 2)},
    "rows_dgrad_kernel": _ROWS | {"ACROSS": (1, 2)},
    "rows_wgrad_kernel": _ROWS | {"BLOCK": (16,), "WIDE": (32, 64), "num_warps": (1, 2, 4, 8), "ACROSS": (1, 2)},
    "convolve_fwd_kernel": {"BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "convolve_dgrad_kernel": {"BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "convolve_wgrad_kernel": {"BLOCK": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    "state_bwd_kernel": {"num_warps": (1, 2, 4, 8)},
    "pool_fwd_kernel": {"num_warps": (1, 2, 4)},
    "node_fwd_kernel": {"BLOCK": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4)},
    "node_reduce_kernel": {"BLOCK": (64, 128, 256, 512), "num_warps": (2, 4, 8)},
    "normalize_bwd_kernel": {"num_warps": (2, 4, 8)},
}


def variants(launch) -> list:
    """The launch with each choice of options."""
    options, found = CANDIDATES[launch.kernel.fn.__name__], []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        if launch.kernel.fn.__name__ == "node_fwd_kernel":
            grid = (pieces(launch.arguments["M"], chosen["BLOCK"]),)
            found.append(launch._replace(arguments=launch.arguments | chosen, grid=grid))
        elif "TALL" not in options:
            found.append(launch._replace(arguments=launch.arguments | chosen))
        elif _sensible(launch, **chosen):
            found.append(_reshaped(launch, chosen))
    return found or [launch]


def choice(launch) -> dict:
    """Its options, of those that are tried."""
    return {name: launch.arguments[name] for name in CANDIDATES[launch.kernel.fn.__name__]}


def _sensible(launch, BLOCK, TALL, WIDE, num_warps, num_stages, ACROSS) -> bool:
    """Whether a thread's part of the sums, of what is loaded and of the rows of a warp is one that can be fast."""
    name, given = launch.kernel.fn.__name__, launch.arguments
    wide, threads = max(16, given["P"]), 32 * num_warps
    columns = max(16, given["EDGES"] * given["P"] * ACROSS)
    if given["EDGES"] == 2:  # is between one and four
        return False
    if num_stages == 1 and (BLOCK, TALL) != (given["BLOCK"], given["TALL"]):  # whether it pays shows at one
        return False
    fit = columns <= 128 if name == "rows_wgrad_kernel" else given["EDGES"] == 1 and given["P"] <= 8
    if TALL > given["H"] or ACROSS > 1 and not (fit and in_pairs(given["W"])):
        return False
    if name == "rows_wgrad_kernel":
        sums, loaded = 5 * columns * WIDE / threads, TALL * BLOCK * columns / 2 / threads
        return WIDE <= 4 * wide and 40 <= sums <= 160 and 16 <= loaded <= 64
    if not 16 <= BLOCK // num_warps <= 64:
        return False
    if name == "rows_dgrad_kernel":
        sums = TALL * BLOCK * given["P"] * ACROSS / threads
        return WIDE == min(32, columns) and 8 <= sums <= 128
    return WIDE <= wide and 32 <= TALL * BLOCK * given["EDGES"] * given["P"] * ACROSS / threads <= 128


def _reshaped(launch, options):
    """With other tiles: another grid, and a buffer for the shares that as many programs leave."""
    given = {key: value for key, value in launch.arguments.items() if key != "maxnreg"} | options
    size = tuple(pieces(given[side], given.get("STRIDE", 1)) for side in "HW")
    tiles, grid = rows_tiles(given["IMAGES"], size, given), launch.grid
    if launch.kernel.fn.__name__ == "rows_wgrad_kernel":
        grid = wgrad_grid(tiles, grid[1], given["C"], 5, given)
        elements = grid[0] * given["ACROSS"] * given["DISTANCE"]
    else:  # a share of three numbers at most, of each instance and channel
        shares = rows_shares(given["IMAGES"], size, given)
        grid, elements = (tiles, *grid[1:]), launch.tensors["opened_ptr"].numel() * shares * 3 * given["C"]
        if "SHARES" in given:
            given["SHARES"] = shares
    partial = torch.empty(elements, device=launch.tensors["x_ptr"].device)
    return launch._replace(grid=grid, arguments=given, tensors=launch.tensors | {"partial_ptr": partial})


def distinct(launches) -> dict[str, list]:
    """[launch, how often] of each configuration that can be tuned, by what tells it apart."""
    found = {}
    for launch in launches:
        if launch.kernel.fn.__name__ in CANDIDATES:
            told = f"{launch.kernel.fn.__name__} {launch.grid} {aot.told(launch)}"
            found.setdefault(told, [launch, 0])[1] += 1
    return found


# kernel -> the rule in tuning.py that it has its options from, and that rule's arguments
RULES = {
    "rows_fwd_kernel": ("rows_forward", "P", "COLUMNS", "W", "PRECISION", "SIZE"),
    "rows_dgrad_kernel": ("rows_data_gradient", "P", "COLUMNS", "W", "STRIDE", "PRECISION", "SIZE"),
    "rows_wgrad_kernel": ("rows_weight_gradient", "P", "COLUMNS", "W", "PRECISION", "SIZE"),
    "convolve_fwd_kernel": ("convolution", "P_IN", "COLUMNS", "W", "PRECISION", "SIZE"),
    "convolve_dgrad_kernel": ("data_gradient", "P_IN", "COLUMNS", "STRIDE", "PRECISION", "SIZE"),
    "convolve_wgrad_kernel": ("weight_gradient", "P_IN", "COLUMNS", "PRECISION", "SIZE"),
    "pool_fwd_kernel": ("pooling", "P", "SIZE", "STRIDE"),
    "node_fwd_kernel": ("node", "P", "K", "SIZE"),
    "node_reduce_kernel": ("reducing", "P", "SIZE"),
    "normalize_bwd_kernel": ("normalize_backward", "P", "SIZE"),
    "state_bwd_kernel": ("state_gradient", "P", "SIZE", "STRIDE"),
}


def rule_of(launch) -> tuple:
    """As a key of timed.TIMED."""
    given = dict(launch.arguments)
    given["SIZE"] = next(
        launch.tensors[x].element_size() for x in ("x_ptr", "d_ptr", "work_ptr") if x in launch.tensors
    )
    given["COLUMNS"] = given.get("EDGES", 1) * given["P"]
    if "C_IN" in given:
        given["P_IN"] = padded(given["C_IN"])
    rule, *arguments = RULES[launch.kernel.fn.__name__]
    return rule, *(given[name] for name in arguments)


def configurations(arch: int) -> list[dict]:
    """What is to be compiled, found on the meta device, as aot.configurations gives it; some of it more than once."""

    def launches():
        searched = aot.searched("cifar", torch.bfloat16, aot.Options(partial=(2,)))
        for launch, _ in distinct(searched).values():
            yield from variants(launch)

    return aot.specialized(launches(), arch)


def tune(device: str = "cuda", rounds: int = 9, dry_run: bool = False) -> dict:
    """{"rows": [{"told", "calls", "seconds": a call as it is, "best", "best_seconds", "times": {options: s}}], "timed":
    the text of timed.py with what is faster}. Where the GPU refuses to go on after a variant's fault, "stopped" names
    it, and timed.py stays as it is: other launches may not be able to take what was found."""
    from fpdarts.kernels.triton.launch import counting

    from benchmarks.cases import Setting, build
    from benchmarks.sides import Side

    sizes = dict(batch_size=2, init_channels=4, cells=1, image_size=4) if dry_run else dict(batch_size=256)
    launches = []
    for what in ("search-step", "arch-step"):
        case = build(what, Side("triton", bf16=not dry_run), Setting(**sizes, device=device))
        case.step(0)
        with counting() as launched:
            case.step(1)
        launches += launched.all
    rows, found = [], defaultdict(list)
    known, here = timed.TIMED if timed.CHIP == chip() else {}, chip()
    for told, (launch, calls) in distinct(launches).items():
        now, times = _seconds(launch, device, rounds), {}
        for variant in variants(launch)[: 1 if dry_run else None]:
            chosen = choice(variant)
            name = " ".join(f"{option}={value}" for option, value in chosen.items())
            try:
                times[name] = _seconds(variant, device, rounds)
                if variant is not launch:  # of which there is no other choice
                    found[rule_of(launch)].append((calls * times[name], calls * now, chosen))
            except Exception as error:  # shapes that the chip cannot hold
                print(f"{told}: {name}: {type(error).__name__}", flush=True)
                if not _goes_on(device):
                    print(f"stopped: {error}")
                    return {"rows": rows, "timed": written(known, here), "stopped": f"{told}: {name}: {error}"}
        best = min(times, key=times.get)
        rows.append(
            {"told": told, "calls": calls, "seconds": now, "best": best, "best_seconds": times[best], "times": times}
        )
        print(f"{calls:3d} x {now * 1e6:7.1f} -> {times[best] * 1e6:7.1f} us {best}: {told}", flush=True)
    chosen, gained = fastest(found)
    total = sum(row["calls"] * row["seconds"] for row in rows)
    print(f"in all {total * 1e3:.2f} ms, with {len(chosen)} other choices {(total - gained) * 1e3:.2f} ms")
    return {"rows": rows, "timed": written(known | chosen, here)}


def fastest(found: dict[tuple, list[tuple]]) -> tuple[dict, float]:
    """({rule and arguments: options}, seconds gained). found: of each rule and arguments, for every launch and variant,
    its seconds, those of the launch as it is, and the options."""
    chosen, gained = {}, 0.0
    for rule, trials in found.items():
        variants = defaultdict(list)
        for seconds, now, options in trials:
            variants[tuple(options.items())].append((seconds, now))
        most = max(map(len, variants.values()))  # of a rule's launches; one that some cannot take is no choice
        sums = {options: [sum(times) for times in zip(*of)] for options, of in variants.items() if len(of) == most}
        options, (seconds, now) = min(sums.items(), key=lambda item: item[1][0])
        if seconds < WORTH * now:
            registers = {"maxnreg": None} if "TALL" in dict(options) else {}  # those of the rule are for its own block
            chosen[rule], gained = dict(options) | registers, gained + now - seconds
    return chosen, gained


def written(table: dict, of_chip: int) -> str:
    """The source of timed.py with the table."""
    head = re.sub(r"CHIP = \d+", f"CHIP = {of_chip}", Path(timed.__file__).read_text().partition("TIMED = ")[0])
    lines = [f"    {rule!r}: {options!r},  # fmt: skip" for rule, options in sorted(table.items(), key=repr)]
    return head + "\n".join(["TIMED = {", *lines, "}"]) + "\n"


def _goes_on(device: str) -> bool:
    """Whether the GPU still serves this process: after a fault it refuses."""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


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
