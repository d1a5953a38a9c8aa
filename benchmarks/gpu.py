"""Everything that a machine with an NVIDIA GPU is asked, in one script: is it right, how fast, and does it search?

    python -m benchmarks.gpu --out DIR [--data CIFAR-10] [--minutes 10] [--parts check-fp32,steps-bf16]
        [--precompiled FILE] [--dry-run]

Needs torch, triton, numpy and pillow (part ``loading`` torchvision, too), nothing else, and fetches nothing; it runs
from the root of a checkout that need not be installed. Each part runs in a process of its own, with a time limit, and
leaves DIR/<part>.json before the next one begins; one that is there already is not run again, so that a second call
goes on where time ran out. The summary is printed last, and DIR/gpu.json holds everything.

--data: a CIFAR-10 archive's folder, an image folder, or a .tar of one. --precompiled: what benchmarks.precompile made.
Part ``tuning`` writes kernels/triton/timed.py, to be kept; if ``check-tuned`` does not pass with it, it is taken back.
--dry-run: all of it on the CPU, in Triton's interpreter, with tiny shapes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import triton

from benchmarks.precompile import same_keys, unpack

TIMED = Path(__file__).parents[1] / "kernels" / "triton" / "timed.py"
BEFORE = "timed-before.py"  # what it was before tuning
TIMED_OUT = "timed out"
SKIPPED = ("compiled",)  # unless asked for: torch.compile takes minutes


def environment(options):
    import torch

    from benchmarks import report
    from benchmarks.limits import measure

    limits = {}
    for dtype in ("float32", "bfloat16"):
        torch.set_float32_matmul_precision("high")
        limits[dtype] = measure(options.device, getattr(torch, dtype), rounds=2 if options.dry_run else 8).as_dict()
    memory = torch.cuda.get_device_properties(0).total_memory if options.device == "cuda" else None
    return {**report.environment(options.device), "limits": limits, "device_memory": memory}


def compile_kernels(options):
    """All that the parts will launch, on all cores, into Triton's cache: later parts would do it one by one."""
    import torch

    from benchmarks import aot, precompile

    if options.dry_run:  # the interpreter compiles nothing
        return {"jobs": 0, "errors": []}
    major, minor = torch.cuda.get_device_capability()
    jobs, hits = precompile.jobs(10 * major + minor), []
    if options.precompiled:
        triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
        if all(aot.binary(job) and hits[-1] for job in jobs[::100]):
            print(f"{len(jobs)} configurations, compiled elsewhere")
            return {"jobs": len(jobs), "errors": [], "precompiled": options.precompiled}
    _, errors = precompile.compile_all(jobs)
    print(f"{len(jobs)} configurations; {errors[:10] or 'all compile'}")
    return {"jobs": len(jobs), "errors": errors}


def check(options, amp):
    from fpdarts import check
    from fpdarts.check_cases import Shape, operations

    checked = None
    if options.dry_run:
        everything = operations((Shape(4, 2, 4),), ((4, 4),))
        wanted = ("stage dil_conv_3x3, stride 1", "node", "normalize", "derived cell, drop-path")
        checked = {name: everything[name] for name in wanted}
    return check.check_kernels("triton", options.device, amp, checked=checked)


def _setting(options, what, **given):
    from benchmarks.setting import Setting

    retrained = what == "retrain-step"
    sizes = dict(batch_size=96, init_channels=36, cells=20) if retrained else dict(batch_size=256)
    if options.dry_run:
        sizes = dict(batch_size=2, init_channels=4, cells=1, image_size=4)
        sizes |= dict(cells=3, image_size=16) if retrained else {}
    return Setting(**(sizes | given), device=options.device)


def _compared(options, names, precision, whats=("search-step", "arch-step")):
    """All sides in one run, in each kind of step; where one fails, each against the first, so that the others count."""
    import torch

    from benchmarks.compare import compare
    from benchmarks.limits import measure

    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    dtype = torch.bfloat16 if "bf16" in names[0] else torch.float32
    limits = measure(options.device, dtype, rounds=2 if options.dry_run else 8)
    results = {}

    def add(what, gates, sides):
        key, memory = f"{what}, {gates}: {', '.join(sides)}", not options.dry_run and gates == "both"
        rounds = 1 if options.dry_run else 8
        try:
            results[key] = compare(what, sides, _setting(options, what, gates=gates), rounds, memory, limits)
        except Exception as error:
            results[key] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(key, _brief(results[key]), flush=True)
        return "error" not in results[key]

    for what in whats:
        for gates in ("both", "step") if what == "search-step" else ("both",):
            if not add(what, gates, names):
                for other in names[1:]:
                    add(what, gates, [names[0], other])
    if all("error" in result for result in results.values()):
        raise RuntimeError("none of these could be compared")
    return results


def _brief(result):
    if "error" in result:
        return result["error"][:200]
    told = []
    for side, seconds in result["seconds"].items():
        memory = result["peak_memory"][side]
        told.append(
            f"{side} {seconds['median'] * 1e3:.2f} ms ({seconds['share_of_limit']:.0%} of the limit"
            + (f", {memory / 1e9:.2f} GB)" if memory else ")")
        )
    return "; ".join(told) + "".join(f"; {r['median']:.1f}x over {name}" for name, r in result["ratio"].items())


def steps(options, precision, bf16):
    mark, graph = "+bf16" if bf16 else "", "" if options.dry_run else "+graph"
    names = [f"triton{mark}{graph}", f"triton{mark}", f"eager{mark}", f"channels_last{mark}", f"eager{mark}+graph"]
    if options.dry_run:
        names = ["triton", "eager"]
    return _compared(options, names, precision)


def retrain_steps(options):
    names = ["triton+bf16+graph", "triton+bf16", "eager+bf16", "channels_last+bf16", "channels_last+bf16+graph"]
    if options.dry_run:
        names = ["triton", "channels_last"]
    return _compared(options, names, "high", ("retrain-step",))


def compiled(options):
    graph = "" if options.dry_run else "+bf16+graph"
    return _compared(options, [f"triton{graph}", "compile+bf16"], "high", ("search-step",))


def kernels(options):
    """Device time of every kernel in one weight step, one architecture step and one step of retraining."""
    import torch
    from fpdarts.kernels.triton.launch import counting
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.cases import build
    from benchmarks.limits import synchronize
    from benchmarks.sides import Side

    torch.set_float32_matmul_precision("high")
    found = {}
    for what in ("search-step", "arch-step", "retrain-step"):
        case = build(what, Side("triton", bf16=not options.dry_run), _setting(options, what))
        for i in range(1 if options.dry_run else 3):
            case.step(i)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
        with counting() as launched, profile(activities=activities) as profiled:
            case.step(3)
            synchronize(options.device)
        rows = []
        for event in profiled.key_averages():
            seconds = getattr(event, "self_device_time_total", 0) / 1e6
            if seconds > 0 and str(event.device_type).endswith("CUDA"):  # not the operators that launched it, too
                rows.append({"kernel": event.key[:90], "calls": event.count, "seconds": seconds})
        rows.sort(key=lambda row: -row["seconds"])
        found[what] = {"seconds": sum(row["seconds"] for row in rows), "kernels": rows}
        found[what]["launches"] = _by_configuration(launched.all, profiled)
        for row in found[what]["launches"][:25]:
            print(f"{what} {row['microseconds']:9.1f} us {row['gigabytes_per_second']:6.0f} GB/s {row['told']}")
    return found


def _by_configuration(launches, profiled) -> list[dict]:
    """Time of the launches of each configuration of our kernels."""
    from torch.autograd import DeviceType

    from benchmarks import aot

    names = {launch.kernel.fn.__name__ for launch in launches}
    events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and e.name in names]
    events.sort(key=lambda event: event.time_range.start)
    if [event.name for event in events] != [launch.kernel.fn.__name__ for launch in launches]:
        return []  # on the CPU, or where the profiler lost some
    rows = {}
    for event, launch in zip(events, launches):
        told = f"{event.name} {launch.grid} {aot.told(launch)}"
        row = rows.setdefault(told, {"told": told, "calls": 0, "microseconds": 0.0, "bytes": 0.0})
        row["calls"] += 1
        row["microseconds"] += event.time_range.elapsed_us()
        row["bytes"] += launch.moved
    for row in rows.values():
        row["gigabytes_per_second"] = row["bytes"] / row["microseconds"] / 1e3
    return sorted(rows.values(), key=lambda row: -row["microseconds"])


def tuning(options):
    """The parts behind this one run with what it finds."""
    from benchmarks import tune

    result = tune.tune(options.device, dry_run=options.dry_run)
    (Path(options.out) / BEFORE).write_text(TIMED.read_text())
    (Path(options.out) / TIMED.name).write_text(result["timed"])
    if not options.dry_run:
        TIMED.write_text(result["timed"])
    return result


def _take_back(out: Path, code):
    """What ``tuning`` chose, where ``check-tuned`` ended (code: how) and had not passed with it."""
    told, before = out / "check-tuned.json", out / BEFORE
    passed = code == 0 and json.loads(told.read_text())["passed"]
    if before.exists() and code != TIMED_OUT and not passed:
        TIMED.write_text(before.read_text())
        print(f"== {TIMED} is as it was before tuning", flush=True)


def loading(options):
    from benchmarks import loading as benchmark

    return benchmark.on_device(options.device, options.dry_run)


def _data(options) -> str:
    if options.dry_run:
        return "digits"
    path = Path(options.data)
    if path.suffix in (".tar", ".gz", ".tgz"):
        target = Path(options.out) / "data"
        if not target.exists():
            unpacked = target.with_suffix(".partial")  # a part that is killed meanwhile leaves no half of it as data
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
            unpacked.rename(target)
        inside = [entry for entry in target.iterdir() if entry.is_dir()]
        path = inside[0] if len(inside) == 1 else target
    return str(path)


def search(options):
    """The protocol's search, validated in its last epoch only."""
    from fpdarts.config import SearchConfig
    from fpdarts.search import search as run

    tiny = dict(epochs=1, init_channels=4, cells=3, nodes=1, batch_size=6, limit=24, architecture_from=0)
    config = SearchConfig(
        data=_data(options), out=str(Path(options.out) / "search-run"), kernels="triton", device=options.device,
        validate_every=1000, resume=(Path(options.out) / "search-run" / "config.json").exists(),
        **(tiny if options.dry_run else {}),
    )  # fmt: skip
    start = time.perf_counter()
    result = run(config)
    seconds = time.perf_counter() - start
    metrics = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    epochs = [{key: row[key] for key in ("epoch", "seconds", "train_loss", "train_accuracy")} for row in metrics]
    print(f"search: {seconds:.1f} s with data and checkpoints, epochs alone {sum(e['seconds'] for e in epochs):.1f} s")
    return {"seconds": seconds, "epoch_seconds": sum(e["seconds"] for e in epochs), "epochs": epochs, "result": result}


def retrain(options):
    """The found genotype, for as many epochs as fit."""
    from fpdarts.config import RetrainConfig
    from fpdarts.retrain import retrain as run

    found = Path(options.out) / "search-run" / "genotype.json"
    genotype = str(found) if found.exists() else "PC_DARTS_cifar"
    tiny = dict(init_channels=4, cells=3, limit=40, batch_size=10)

    def epochs(count, name):
        start = time.perf_counter()
        config = RetrainConfig(
            data=_data(options), out=str(Path(options.out) / name), genotype=genotype, device=options.device,
            epochs=count, **(tiny if options.dry_run else {}),
        )  # fmt: skip
        result = run(config)
        rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
        return time.perf_counter() - start, [row["seconds"] for row in rows], result

    began = time.perf_counter()
    _, seconds, _ = epochs(2, f"retrain-probe-{int(time.time())}")
    left = options.seconds - (time.perf_counter() - began) - 40
    count = 1 if options.dry_run else max(1, min(600, int(left / seconds[-1])))
    total, seconds, result = epochs(count, f"retrain-run-{int(time.time())}")
    print(f"retrain: {count} epochs in {total:.1f} s, test accuracy {result['test_accuracy']:.2%}")
    return {"epochs": count, "seconds": total, "epoch_seconds": seconds, "genotype": genotype, "result": result}


# part -> (seconds it may take, what it does). In this order: what is most needed comes first.
PARTS = {
    "environment": (120, environment),
    "compile": (420, compile_kernels),
    "check-fp32": (240, lambda options: check(options, "off")),
    "check-bf16": (240, lambda options: check(options, "off" if options.dry_run else "bf16")),
    "tuning": (240, tuning),
    "check-tuned": (240, lambda options: check(options, "off" if options.dry_run else "bf16")),
    "steps-bf16": (420, lambda options: steps(options, "high", True)),
    "kernels": (180, kernels),
    "search": (420, search),
    "retrain-steps": (420, retrain_steps),
    "loading": (150, loading),
    "steps-fp32": (420, lambda options: steps(options, "high", False)),
    "retrain": (540, retrain),
    "compiled": (540, compiled),
}


def _run_part(part, options, out, left) -> dict:
    """In a process of its own: what a kernel can do to a process is not to reach the other parts."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--only", part, "--seconds", f"{left:.0f}"]
    for name in ("data", "precompiled"):
        command += [f"--{name}", getattr(options, name)] * bool(getattr(options, name))
    command += ["--dry-run"] * options.dry_run
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what it has told when its time is over is in the log
    if options.dry_run:
        variables["TRITON_INTERPRET"] = "1"
    log, start = out / f"{part}.log", time.perf_counter()
    with log.open("w") as stream:
        child = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )  # fmt: skip
        try:
            code = child.wait(left)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
            os.killpg(child.pid, signal.SIGKILL)  # its compilers too: they would go on beside the next part
            child.wait()
    tail = log.read_text().splitlines()
    print(f"== {part}: {'done' if code == 0 else code} in {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(tail[-40:] if code == 0 else tail[-25:]), flush=True)
    return {"code": code, "seconds": time.perf_counter() - start}


def main(options):
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        same_keys()
        result = PARTS[options.only][1](options)
        target = out / f"{options.only}.json"
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1, default=str) + "\n")
        partial.replace(target)
        return 0
    deadline, ran = time.perf_counter() + 60 * options.minutes, {}
    if options.precompiled:
        unpack(Path(options.precompiled), Path(triton.knobs.cache.dir))
    parts = options.parts.split(",") if options.parts else [part for part in PARTS if part not in SKIPPED]
    for part in parts:
        if part not in PARTS:
            sys.exit(f"benchmarks.gpu: unknown part {part!r}; the parts are {', '.join(PARTS)}")
        if part in ("search", "retrain") and not (options.data or options.dry_run):
            print(f"== {part}: skipped, it needs --data")
            continue
        left = min(PARTS[part][0] * (1 + options.dry_run), deadline - time.perf_counter())  # the interpreter is slow
        if (out / f"{part}.json").exists():
            print(f"== {part}: done before")
        elif left < 20:
            print(f"== {part}: no time left")
        else:
            ran[part] = _run_part(part, options, out, left)
            if part == "check-tuned" and not options.dry_run:
                _take_back(out, ran[part]["code"])
    found = {part: json.loads((out / f"{part}.json").read_text()) for part in PARTS if (out / f"{part}.json").exists()}
    (out / "gpu.json").write_text(json.dumps(found | {"ran": ran}, indent=1) + "\n")
    _summary(found)
    return 0 if all(part["code"] == 0 for part in ran.values()) else 1


def _summary(found):
    print("== summary")
    for part, result in found.items():
        if part == "environment":
            peak = {name: f"{limit['flops_per_second'] / 1e12:.0f} TFLOP/s" for name, limit in result["limits"].items()}
            bandwidth = result["limits"]["float32"]["bytes_per_second"] / 1e9
            print(f"{result['machine']['gpu']}, {result['versions']}, {peak}, copy {bandwidth:.0f} GB/s")
        elif part.startswith("check"):
            wrong = [row["operation"] for row in result["rows"] if not row["passed"]]
            print(f"{part}: {'passed' if result['passed'] else 'WRONG: ' + ', '.join(wrong)}")
        elif part.startswith("steps") or part in ("retrain-steps", "compiled"):
            for key, value in result.items():
                print(f"{key}: {_brief(value)}")
        elif part == "kernels":
            print(", ".join(f"{what}: {rows['seconds'] * 1e3:.2f} ms in kernels" for what, rows in result.items()))
        elif part == "search":
            print(
                f"search: {result['epoch_seconds']:.1f} s of epochs, {result['seconds']:.1f} s in all", result["result"]
            )
        elif part == "retrain":
            accuracy = result["result"]["test_accuracy"]
            print(f"retrain: {result['epochs']} epochs, {accuracy:.2%}, {min(result['epoch_seconds']):.2f} s an epoch")


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--parts", help="comma between them; without, all but " + ", ".join(SKIPPED))
    parser.add_argument("--precompiled", help="what benchmarks.precompile made for this GPU")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="this part, in this process")
    parser.add_argument("--seconds", type=float, default=540, help="with --only: what is left")
    options = parser.parse_args()
    options.device = "cpu" if options.dry_run else "cuda"
    return options


if __name__ == "__main__":
    import fpdarts  # noqa: F401  finds fpdarts.kernels in a checkout

    sys.exit(main(_options()))
