"""README's table of measured speed, made from benchmarks/results.

python -m benchmarks.table          writes it into README.md, between its two marks
python -m benchmarks.table --print  only prints it
"""

import json
import sys

from benchmarks.report import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks.table -->", "<!-- end of benchmarks.table -->"


def _comparisons() -> list[dict]:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in results if "seconds" in result]


def table() -> str:
    """Markdown: a row a side of every comparison there is, machine by machine."""
    lines = []
    for result in _comparisons():
        environment, setting = result["environment"], result["setting"]
        machine, limit = environment["machine"], result["limit"]
        where = machine["gpu"] or f"{limit['threads']} threads of {machine['cpu']}"
        gates = {"both": "both paths", "step": "drawn gates"}[setting["gates"]]
        what = f"{result['what']}, batch {setting['batch_size']}, C={setting['init_channels']}"
        if result["what"].endswith("step"):
            what += f", {setting['cells']} cells"
        if result["what"] in ("search-step", "arch-step"):
            what += f", {gates}"
        scaling = f" ({limit['scaling']:.1f} times one thread's)" if limit["scaling"] else ""
        lines += [
            f"**{what}** on {where}, torch {environment['versions']['torch']}. Limits measured in the same run: "
            f"{limit['flops_per_second'] / 1e9:.0f} GFLOP/s{scaling} and {limit['bytes_per_second'] / 1e9:.0f} GB/s; "
            f"the nearer one, the {limit['nearer']}, allows {_seconds(limit['seconds'])}.",
            "",
            f"| side | time | over {result['kernels']} (range) | GFLOP/s | GB/s | share of the limit | peak memory |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for side, seconds in result["seconds"].items():
            ratio, memory = result["ratio"].get(side), result["peak_memory"][side]
            times = f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1"
            lines.append(
                f"| `{side}` | {_seconds(seconds['median'])} | {times} | {seconds['flops_per_second'] / 1e9:.1f} "
                f"| {seconds['bytes_per_second'] / 1e9:.1f} | {seconds['share_of_limit']:.1%} "
                f"| {f'{memory / 1e9:.2f} GB' if memory is not None else ''} |"
            )
        lines.append("")
    return "\n".join(lines)


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
    if "--print" in sys.argv[1:]:
        print(table())
    else:
        README.write_text(filled(README.read_text()))
