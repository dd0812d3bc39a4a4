"""Mean and standard deviation of several evaluations: of runs with different seeds, for one.

python benchmarks/summarise_runs.py results/seed*/metrics.json
python benchmarks/summarise_runs.py docs/results/camvid_study.jsonl --plot docs/results/camvid_study.png
python benchmarks/summarise_runs.py docs/results/camvid_study.jsonl --steps 2400 --base r0_batch6

Of files of evaluate.py, class by class. Of the JSON lines of ``benchmarks/study.py``, a table of its
settings, with the difference to one of them (``--base``, R = 0) and its 95 % interval, paired by seed.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

SPLITS = ("val", "test")


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


def print_classes(paths: list[Path], json_path: Path | None) -> None:
    runs = [load(path) for path in paths]
    if len({tuple(run["IoU"]) for run in runs}) > 1:
        raise SystemExit("the files are of different classes")
    summary = summarise(runs)
    width = max(map(len, summary))
    print(f"{'':<{width}}    mean ± std   of {len(runs)} runs, in per cent")
    for name, (mean, deviation, count) in summary.items():
        spread = "" if deviation is None else f"± {100 * deviation:.2f}"
        fewer = f"   {count} runs" if count < len(runs) else ""
        print(f"{name:<{width}}  {100 * mean:6.2f} {spread:<7}{fewer}".rstrip())
    if json_path:
        numbers = {name: {"mean": mean, "std": std, "runs": n} for name, (mean, std, n) in summary.items()}
        json_path.write_text(json.dumps(numbers, indent=1) + "\n")


def kind_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What runs of a study that are compared have in common: length, protocol, weights and precision."""
    flags = line["flags"].split()
    amp = flags[flags.index("--amp") + 1] if "--amp" in flags else "off"
    return line["steps"], line["protocol"], line["weights"], amp


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a study, one a run."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            kind_of(line), line["setting"], line["seed"], [line[split]["mIoU"] for split in SPLITS]
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path}: not the lines of benchmarks/study.py") from None
    return lines


def load_study(path: Path, steps: int | None = None) -> dict[str, dict[int, dict[str, float]]]:
    """mIoU in per cent by setting, seed and split; of one kind of runs, the one that most are of.

    Args:
        steps: only runs of this length.
    """
    lines = [line for line in read_lines(path) if steps in (None, line["steps"])]
    if not lines:
        raise SystemExit(f"{path}: no runs" + (f" of {steps} steps" if steps else ""))
    kind = statistics.mode(map(kind_of, lines))
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        if kind_of(line) == kind:
            scores = {split: 100 * line[split]["mIoU"] for split in SPLITS}
            runs.setdefault(line["setting"], {})[line["seed"]] = scores
    if left_out := sum(kind_of(line) != kind for line in lines):
        print(f"{left_out} runs of another length, protocol, weights or precision are left out")
    return runs


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float] | None:
    """Mean difference over the seeds that both have, and half of its 95 % interval (Student's t)."""
    from scipy.stats import t

    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(t.ppf(0.975, len(differences) - 1)) * error


def of_split(by_seed: dict[int, dict[str, float]], split: str) -> dict[int, float]:
    return {seed: scores[split] for seed, scores in by_seed.items()}


def print_study(runs: dict[str, dict[int, dict[str, float]]], base_name: str) -> None:
    print(f"| Setting | Runs | val | test | val, less {base_name} | test, less {base_name} |")
    print("|---|---|---|---|---|---|")
    for name, by_seed in runs.items():
        cells = [name, str(len(by_seed))]
        for split in SPLITS:
            values = list(of_split(by_seed, split).values())
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        for split in SPLITS:
            base = of_split(runs[base_name], split)
            difference = paired(of_split(by_seed, split), base) if name != base_name else None
            cells.append("-" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}")
        print(f"| {' | '.join(cells)} |")


def plot_study(runs: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Each run as a point, each setting's mean as a bar."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(SPLITS), figsize=(9, 3.5), layout="constrained")
    for axes, split in zip(panels, SPLITS, strict=True):
        for index, by_seed in enumerate(runs.values()):
            values = list(of_split(by_seed, split).values())
            axes.plot([index] * len(values), values, "o", color="tab:blue", alpha=0.6)
            bar = [index - 0.25, index + 0.25], [statistics.mean(values)] * 2
            axes.plot(*bar, color="tab:orange", linewidth=3)
        axes.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right", rotation_mode="anchor")
        axes.set_title(f"{split} mIoU, per cent")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="metrics.json files, or the lines of one study")
    parser.add_argument("--json", type=Path, help="write the numbers of metrics.json files there as well")
    parser.add_argument("--plot", type=Path, help="PNG of a study's runs")
    parser.add_argument("--base", default="r0", help="setting to compare with (default: r0)")
    parser.add_argument("--steps", type=int, help="of a study, only runs of this length")
    options = parser.parse_args()
    if options.files[0].suffix != ".jsonl":
        if options.plot:
            parser.error("--plot takes the lines of a study")
        print_classes(options.files, options.json)
        return
    if len(options.files) > 1 or options.json:
        parser.error("of a study one file is taken, and --json is for metrics.json files")
    runs = load_study(options.files[0], options.steps)
    if options.base not in runs:
        parser.error(f"--base {options.base}: expected one of {', '.join(runs)}")
    print_study(runs, options.base)
    if options.plot:
        plot_study(runs, options.plot)


if __name__ == "__main__":
    main()
