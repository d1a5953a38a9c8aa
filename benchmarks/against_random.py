"""Does the search choose? Genotypes found by searches against as many random ones, all retrained equally short.

    python -m benchmarks.against_random --seeds 5 --out DIR [--data digits] [--json]

DIR holds a directory a run and results.json; runs that are there already are not repeated, and those that were stopped
go on.
"""

import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import report
from fpdarts.config import RetrainConfig, SearchConfig
from fpdarts.genotype import random_genotype
from fpdarts.run import read_config


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

    if options.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, not {options.seeds}")
    out, accuracies = Path(options.out), {"found": [], "random": []}
    for seed in range(options.seeds):
        found, drawn = out / f"search-{seed}", out / f"random-{seed}.json"
        given = dict(data=options.data, seed=seed)
        search(_begun(SearchConfig(**given, out=str(found), epochs=options.search_epochs, validate_every=1000)))
        random_genotype(random.Random(seed)).save(drawn)
        for side, genotype in (("found", found), ("random", drawn)):
            run = str(out / f"retrain-{side}-{seed}")
            config = RetrainConfig(**given, genotype=str(genotype), out=run, epochs=options.retrain_epochs)
            accuracies[side].append(retrain(_begun(config))["test_accuracy"])
    result = {
        side: {"mean": statistics.mean(values), "deviation": statistics.stdev(values), "test_accuracy": values}
        for side, values in accuracies.items()
    }
    report.write(out / "results.json", result, "cuda" if torch.cuda.is_available() else "cpu")
    return result


def _begun(config: SearchConfig | RetrainConfig) -> SearchConfig | RetrainConfig:
    """To be resumed, if its run is there. Raises ValueError if that is of another command."""
    if not (Path(config.out) / "config.json").exists():
        return config
    saved = read_config(config.out, type(config))
    for name in ("data", "epochs"):
        if (asked := getattr(config, name)) not in (None, getattr(saved, name)):
            raise ValueError(f"{config.out} has {name} {getattr(saved, name)}, not {asked}; choose another --out")
    return replace(config, resume=True)


def show(result: dict, _) -> str:
    lines = []
    for side, values in result.items():
        each = ", ".join(f"{value:.2%}" for value in values["test_accuracy"])
        lines.append(f"{side:7s} {values['mean']:.2%} +- {values['deviation']:.2%}   ({each})")
    return "\n".join(lines)


if __name__ == "__main__":
    report.command("against_random", Options, main, show, __doc__)
