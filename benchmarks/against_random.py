"""Does the search choose? Genotypes found by searches against as many random ones, all retrained equally short.

    python -m benchmarks.against_random --seeds 5 --out DIR [--data digits] [--json]

DIR holds a directory a run and results.json; runs that are there already are not repeated.
"""

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from fpdarts.config import RetrainConfig, SearchConfig
from fpdarts.genotype import random_genotype


@dataclass(frozen=True)
class Options:
    out: str
    seeds: int = 5
    """At least 2: the result is a mean and a deviation."""
    data: str = "digits"
    search_epochs: int | None = None
    retrain_epochs: int | None = None
    json: bool = False


def main(options: Options) -> dict:
    """Test accuracies, mean and standard deviation of each side, and every pair."""
    from fpdarts.retrain import retrain
    from fpdarts.search import search

    out, accuracies = Path(options.out), {"found": [], "random": []}
    for seed in range(options.seeds):
        found, drawn = out / f"search-{seed}", out / f"random-{seed}.json"
        if not (found / "result.json").exists():
            search(
                SearchConfig(
                    data=options.data, out=str(found), seed=seed, epochs=options.search_epochs, validate_every=1000
                )
            )
        random_genotype(random.Random(seed)).save(drawn)
        for side, genotype in (("found", found), ("random", drawn)):
            run = out / f"retrain-{side}-{seed}"
            if not (run / "result.json").exists():
                retrain(
                    RetrainConfig(
                        data=options.data,
                        genotype=str(genotype),
                        out=str(run),
                        seed=seed,
                        epochs=options.retrain_epochs,
                    )
                )
            accuracies[side].append(json.loads((run / "result.json").read_text())["test_accuracy"])
    result = {
        side: {"mean": statistics.mean(values), "deviation": statistics.stdev(values), "test_accuracy": values}
        for side, values in accuracies.items()
    }
    report.write(out / "results.json", result)
    return result


def show(result: dict, _) -> str:
    lines = []
    for side, values in result.items():
        each = ", ".join(f"{value:.2%}" for value in values["test_accuracy"])
        lines.append(f"{side:7s} {values['mean']:.2%} +- {values['deviation']:.2%}   ({each})")
    return "\n".join(lines)


if __name__ == "__main__":
    report.command("against_random", Options, main, show, __doc__)
