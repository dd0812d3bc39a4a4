"""The curve of a run: loss and learning rate over the steps, and mIoU where it was evaluated on the way.

python benchmarks/plot_log.py snapshots/demo/log.jsonl curve.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    try:
        every = [json.loads(line) for line in options.log.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{options.log}: not the log.jsonl of a run ({error})") from None
    lines = [line for line in every if "loss" in line]
    if not lines:
        raise SystemExit(f"{options.log}: no losses have been written yet")
    scores = [(line["step"], line["mIoU"]) for line in every if line.get("mIoU") is not None]
    steps, losses, rates = ([line[key] for line in lines] for key in ("step", "loss", "learning_rate"))
    window = max(len(losses) // 30, 1)
    smooth = [sum(part) / len(part) for end in range(1, len(losses) + 1) if (part := losses[:end][-window:])]

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss")
    axes.plot(steps, smooth, color="tab:blue", label=f"mean of the last {window} entries")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right = axes.twinx()
    right.plot(steps, rates, color="tab:gray", linestyle="--", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    if scores:
        third = axes.twinx()
        third.spines.right.set_position(("axes", 1.12))
        third.plot(*zip(*scores, strict=True), color="tab:green", marker="o", label="mIoU")
        third.set(ylabel="mIoU", ylim=(0, 1))
    figure.legend(loc="upper right", bbox_to_anchor=(0.9, 0.95))
    figure.savefig(options.picture, dpi=100)


if __name__ == "__main__":
    main()
