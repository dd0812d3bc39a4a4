"""How much of its attention a position gives to its own class, over the images of a split.

python benchmarks/attention_mass.py --data-dir camvid --restore-from snapshots/r2 --short-side 180

For R = 1, 2 … of a trained network: the mean share of a position's attention (docs/op.md, "Attention over R
rounds") that falls on its class; the same where each round spreads its weight evenly over the path, which is
what geometry alone gives; the share of the image that is of the class; the perplexity of the attention, in
positions; and the share of all positions that it reaches. What has no label does not count.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import find_dataset, list_samples  # noqa: E402
from dataset.reading import read_sample  # noqa: E402
from evaluation import Predictor  # noqa: E402
from evaluation.attention_page import attention_rounds  # noqa: E402
from training.snapshots import find_checkpoint  # noqa: E402
from utils.arguments import UsageError, number, run_script  # noqa: E402


def dense(weights: Tensor) -> Tensor:
    """Weights (h,w,h+w) of one round as a matrix (h·w,h·w); a row is a position's attention."""
    h, w = weights.shape[:2]
    column, row = weights.split([h, w], dim=-1)
    matrix = torch.zeros(h, w, h, w, dtype=weights.dtype)
    y, x = torch.arange(h), torch.arange(w)
    matrix[:, x, :, x] = column.transpose(0, 1)
    matrix[y, :, y, :] += row
    return matrix.reshape(h * w, h * w)


def evenly(weights: Tensor) -> Tensor:
    """The round with the same weight at each position of the path; the column's own one does not count."""
    h, w = weights.shape[:2]
    even = torch.ones_like(weights)
    even[torch.arange(h), :, torch.arange(h)] = 0
    return even / (h + w - 1)


def over_rounds(rounds: list[Tensor]) -> list[Tensor]:
    """The matrices (n,n) of attention at R = 1, 2 …, from those of the rounds."""
    products = [rounds[0]]
    for matrix in rounds[1:]:
        products.append(matrix @ products[-1])
    return products


def own_class(attention: Tensor, classes: Tensor, known: Tensor) -> Tensor:
    """For each known position, the share of its attention on known ones that falls on its class.

    Args:
        attention: (n,n), rows sum to 1.
        classes: (n,) class of each position.
        known: (n,) bool, whether it has one.
    """
    weights = attention[known][:, known]
    same = classes[known][:, None] == classes[known]
    return (weights * same).sum(1) / weights.sum(1)


def label_at_positions(label: np.ndarray, h: int, w: int) -> Tensor:
    """The label's classes (H,W) at the centres of h×w positions whose corners are the image's, (h·w,)."""
    rows = np.linspace(0, label.shape[0] - 1, h).round().astype(int)
    columns = np.linspace(0, label.shape[1] - 1, w).round().astype(int)
    return torch.from_numpy(label[rows][:, columns].astype(np.int64)).flatten()


def measure(predictor: Predictor, image: np.ndarray, label: np.ndarray, ignore: int) -> dict[str, Tensor]:
    """The figures of one image, for each of its known positions (n,), or (R,n)."""
    rounds = [one.weights() for one in attention_rounds(predictor, image)]
    h, w = rounds[0].shape[:2]
    classes = label_at_positions(label, h, w)
    known = classes != ignore
    learnt = over_rounds([dense(weights) for weights in rounds])
    even = over_rounds([dense(evenly(weights)) for weights in rounds])
    uniform = torch.full_like(learnt[0], 1 / (h * w))
    return {
        "attention": torch.stack([own_class(matrix, classes, known) for matrix in learnt]),
        "path": torch.stack([own_class(matrix, classes, known) for matrix in even]),
        "image": own_class(uniform, classes, known),
        "perplexity": torch.stack([torch.special.entr(matrix[known]).sum(1).exp() for matrix in learnt]),
        "reached": torch.stack([(matrix[known] > 0).double().mean(1) for matrix in learnt]),
    }


def resized(image: np.ndarray, short_side: int | None) -> np.ndarray:
    """The image with another short side; evaluation resizes in the same manner."""
    if short_side is None:
        return image
    factor = short_side / min(image.shape[:2])
    height, width = (round(side * factor) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--restore-from", type=Path, required=True, help="checkpoint, or a folder")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--short-side", type=number(int, 1), help="size of the images in pixels (default: their own)"
    )
    parser.add_argument(
        "--every", type=number(int, 1), default=1, metavar="N", help="take each Nth image (default: 1)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    options = parser.parse_args()
    predictor = Predictor(find_checkpoint(options.restore_from), device="cpu", amp="off", whole=True)
    spec = find_dataset(options.data_dir)
    if tuple(predictor.names) != tuple(spec.labels.names):
        raise UsageError(f"{options.restore_from}: has other classes than the data set")
    pairs = list_samples(spec, options.data_dir, options.split)[:: options.every]
    found = []
    for pair in pairs:
        image, label = read_sample(pair, spec.labels, spec.ignore_label)
        assert label is not None
        found.append(measure(predictor, resized(image, options.short_side), label, spec.ignore_label))
    # Each image counts the same, whatever its number of labelled positions.
    means = {
        name: torch.stack([one[name].double().mean(-1) for one in found]).mean(0).tolist()
        for name in found[0]
    }
    print(f"{len(pairs)} images; share of the image that is of a position's class: {means['image']:.3f}")
    print("R   own class   path alone   perplexity   positions reached")
    for rounds, row in enumerate(
        zip(*(means[name] for name in ("attention", "path", "perplexity", "reached")), strict=True), start=1
    ):
        print("{}   {:9.3f}   {:10.3f}   {:10.0f}   {:17.3f}".format(rounds, *row))
    if options.json:
        options.json.write_text(json.dumps(means, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
