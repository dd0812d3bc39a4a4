"""Intersection over union and accuracies, from one confusion matrix over all images."""

from typing import Any

import torch
from torch import Tensor

from utils.distributed import Process


class ConfusionMatrix:
    """Counts of (label, prediction) over all pixels whose label is not ignored.

    Args:
        num_classes: N; labels and predictions are 0 .. N-1.
        ignore_index: label that is not counted.
        device: where the counting is done.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count predictions and labels of one shape, any integer dtype."""
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction and label must agree; got {tuple(prediction.shape)}, {tuple(label.shape)}"
            )
        prediction, label = prediction.to(self.counts.device), label.to(self.counts.device)
        counted = label != self.ignore_index
        pair = label[counted].long() * self.num_classes + prediction[counted].long()
        self.counts += torch.bincount(pair, minlength=self.num_classes**2).view_as(self.counts)

    def add_processes(self, process: Process) -> None:
        """Replace the counts by their sum over all processes."""
        self.counts = process.sum(self.counts)

    def iou(self) -> Tensor:
        """(N,) fp64 TP / (TP + FP + FN); NaN for a class that is neither labelled nor predicted."""
        counts = self.counts.double()
        return counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())

    def class_accuracy(self) -> Tensor:
        """(N,) fp64 TP / (TP + FN); NaN for a class that is not labelled."""
        counts = self.counts.double()
        return counts.diag() / counts.sum(1)

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right; NaN if none was counted."""
        counts = self.counts.double()
        return float(counts.diag().sum() / counts.sum())

    def mean_iou(self) -> float:
        """Mean IoU over the classes that are labelled or predicted; see ``num_scored``."""
        return float(self.iou().nanmean())

    def num_scored(self) -> int:
        """How many classes the mean IoU is a mean of."""
        return int((~self.iou().isnan()).sum())

    def summary(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What ``metrics.json`` holds; a value that does not exist is None. "score" is ADE20K's."""
        return {
            "mIoU": _number(self.mean_iou()),
            "scored_classes": self.num_scored(),  # that mIoU is the mean of
            "mean_accuracy": _number(float(self.class_accuracy().nanmean())),
            "pixel_accuracy": _number(self.pixel_accuracy()),
            "score": _number((self.pixel_accuracy() + self.mean_iou()) / 2),
            "IoU": _by_name(names, self.iou()),
            "accuracy": _by_name(names, self.class_accuracy()),
            "confusion_matrix": self.counts.tolist(),  # rows: labels, columns: predictions
        }

    def table(self, names: tuple[str, ...]) -> str:
        """IoU, accuracy and share of the labelled pixels of each class, in per cent, to be printed."""
        width = max(len("mean"), *(len(name) for name in names))
        share = self.counts.sum(1).double() / self.counts.sum()
        lines = [f"{'class':<{width}}     IoU     acc   pixels", "-" * (width + 25)]
        for name, *values in zip(names, self.iou(), self.class_accuracy(), share, strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{_percent(float(v)):>8}" for v in values))
        lines.append("-" * (width + 25))
        means = self.mean_iou(), float(self.class_accuracy().nanmean())
        lines.append(f"{'mean':<{width}}" + "".join(f"{_percent(value):>8}" for value in means))
        score = (self.pixel_accuracy() + self.mean_iou()) / 2
        lines.append(
            f"pixel accuracy {_percent(self.pixel_accuracy())}, mean of it and mIoU {_percent(score)}"
        )
        return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"


def _number(value: float) -> float | None:
    return None if value != value else value


def _by_name(names: tuple[str, ...], values: Tensor) -> dict[str, float | None]:
    return {name: _number(float(value)) for name, value in zip(names, values, strict=True)}
