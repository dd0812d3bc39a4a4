"""The table and the plot of a study: mean ± std by setting, and the difference to R = 0, paired by seed.

python benchmarks/summarise_study.py docs/results/camvid_study.jsonl --plot docs/results/camvid_study.png
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t

BASE = "r0"


def load(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The lines of ``benchmarks/study.py`` by setting and seed; of one length of the runs, the longest."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = max(line["steps"] for line in lines)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["steps"] == steps:
            runs.setdefault(line["setting"], {})[line["seed"]] = line
    return runs


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float] | None:
    """Mean difference over the seeds that both have, and half of its 95 % interval (Student's t)."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(t.ppf(0.975, len(differences) - 1)) * error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, help="JSON lines of benchmarks/study.py")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    options = parser.parse_args()
    runs = load(options.lines)
    print(
        "| Setting | Runs | val mIoU | test mIoU | test, difference to R = 0 (95 %) |\n|---|---|---|---|---|"
    )
    rows = []
    for name, by_seed in runs.items():
        cells = [name, str(len(by_seed))]
        scores = {
            split: {seed: 100 * line[split]["mIoU"] for seed, line in by_seed.items()}
            for split in ("val", "test")
        }
        for split in ("val", "test"):
            values = list(scores[split].values())
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        base = {seed: 100 * line["test"]["mIoU"] for seed, line in runs.get(BASE, {}).items()}
        difference = paired(scores["test"], base) if name != BASE else None
        cells.append("-" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}")
        print(f"| {' | '.join(cells)} |")
        rows.append((name, list(scores["test"].values())))
    if options.plot:
        plot(rows, options.plot)


def plot(rows: list[tuple[str, list[float]]], path: Path) -> None:
    """Each run as a point, each setting's mean as a bar."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for index, (_, values) in enumerate(rows):
        axes.plot([index] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot(
            [index - 0.25, index + 0.25], [statistics.mean(values)] * 2, color="tab:orange", linewidth=3
        )
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylabel("test mIoU, per cent")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
