"""Mean and standard deviation of several evaluations, class by class: of runs with different seeds, for one.

python benchmarks/summarise_runs.py results/seed*/metrics.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """The contents of a ``metrics.json``."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["IoU"].keys(), metrics["mIoU"], metrics["pixel_accuracy"]
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path}: not a metrics.json of evaluate.py") from None
    return metrics


def summarise(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float | None, int]]:
    """For each class, the mean IoU and the pixel accuracy: mean, standard deviation and number of runs.

    The deviation is the sample's (n - 1), None for one run. A class is left out of runs without its pixels.
    """
    rows = {name: [run["IoU"][name] for run in runs] for name in runs[0]["IoU"]}
    rows |= {name: [run[name] for run in runs] for name in ("mIoU", "pixel_accuracy")}
    summary = {}
    for name, values in rows.items():
        there = [value for value in values if value is not None]
        if there:
            deviation = statistics.stdev(there) if len(there) > 1 else None
            summary[name] = (statistics.mean(there), deviation, len(there))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json files")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    options = parser.parse_args()
    runs = [load(path) for path in options.metrics]
    if len({tuple(run["IoU"]) for run in runs}) > 1:
        parser.error("the files are of different classes")
    summary = summarise(runs)
    width = max(map(len, summary))
    print(f"{'':<{width}}    mean ± std   of {len(runs)} runs, in per cent")
    for name, (mean, deviation, count) in summary.items():
        spread = "" if deviation is None else f"± {100 * deviation:.2f}"
        fewer = f"   {count} runs" if count < len(runs) else ""
        print(f"{name:<{width}}  {100 * mean:6.2f} {spread:<7}{fewer}".rstrip())
    if options.json:
        numbers = {name: {"mean": mean, "std": std, "runs": n} for name, (mean, std, n) in summary.items()}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
