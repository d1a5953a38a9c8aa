"""README's table of measured speed, made from benchmarks/results.

    python -m benchmarks.table [--print]

Writes it into README.md, between its two marks, or prints it.
"""

import argparse
import json

from benchmarks.report import RESULTS, ROOT

README = ROOT / "README.md"
AGAINST = ("eager", "channels_last", "compile", "reference", "eager+graph")  # columns, where they were measured
BEGIN, END = "<!-- benchmarks.table -->", "<!-- end of benchmarks.table -->"


def _comparisons() -> list[tuple[str, dict]]:
    """(file name, what `benchmarks.compare` wrote), those of one step together."""
    results = [(path.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    return [(name, result) for name, result in results if "seconds" in result]


def table() -> str:
    """Markdown: a row a comparison, with what each side of today took of its time."""
    lines = [
        "| step | on | took | " + " | ".join(f"`{side}`" for side in AGAINST) + " | of the limit | peak memory |",
        "| --- " * (len(AGAINST) + 5) + "|",
    ]
    for name, result in _comparisons():
        ratios = {side.replace("+bf16", ""): ratio for side, ratio in result["ratio"].items()}
        own = result["seconds"][result["kernels"]]
        cells = [
            f"[{_what(result)}](benchmarks/results/{name})",
            _machine(result),
            f"`{result['kernels']}` {_seconds(own['median'])}",
            *(_ratio(ratios[side]) if side in ratios else "" for side in AGAINST),
            f"{own['share_of_limit']:.0%} ({result['limit']['nearer']})",
            _memory(result),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _what(result: dict) -> str:
    setting = result["setting"]
    parts = [result["what"], f"batch {setting['batch_size']}", f"C={setting['init_channels']}"]
    if result["what"].endswith("step"):
        parts.append(f"{setting['cells']} cells")
    if result["what"] in ("search-step", "arch-step"):
        parts.append({"both": "both paths", "step": "drawn gates"}[setting["gates"]])
    return ", ".join(parts)


def _machine(result: dict) -> str:
    machine, limit = result["environment"]["machine"], result["limit"]
    where = machine["gpu"] or f"{limit['threads']} threads of {machine['cpu']}"
    speed = f"{limit['flops_per_second'] / 1e9:,.0f} GFLOP/s, {limit['bytes_per_second'] / 1e9:,.0f} GB/s"
    return f"{where} ({speed}), torch {result['environment']['versions']['torch']}"


def _ratio(ratio: dict) -> str:
    return f"{ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})"


def _memory(result: dict) -> str:
    """In GB and as a share of what `eager` needs in the same precision."""
    memory, kernels = result["peak_memory"], result["kernels"]
    eager = memory.get("eager+bf16" if "bf16" in kernels else "eager")
    own = memory.get(kernels)
    if own is None:
        return ""
    return f"{own / 1e9:.2f} GB" + (f", {own / eager:.0%} of `eager`" if eager else "")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def filled(readme: str) -> str:
    """The README with the table between its marks. Raises ValueError where it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, between which the table goes")
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "python -m benchmarks.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="only print it")
    if parser.parse_args().print:
        print(table())
    else:
        README.write_text(filled(README.read_text()))
