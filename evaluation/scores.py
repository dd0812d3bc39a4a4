"""Scoring a network on labelled images; the images may be divided over processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dataset import DataError, EvaluationDataset, Sample, load_samples
from evaluation.bands import class_ids
from evaluation.inference import Predict, PredictionError
from evaluation.metrics import ConfusionMatrix
from evaluation.pictures import Save
from utils.distributed import Process


def validation_scores(
    predict: Predict,
    dataset: EvaluationDataset,
    process: Process,
    num_workers: int,
    until: Callable[[Iterator[Sample]], Iterator[Sample]],
) -> dict[str, Any] | None:
    """Scores of a network during training; to be called in all processes, which share the images.

    Args:
        num_workers: processes that read the samples.
        until: ends the iteration over samples early if a signal came.

    Returns:
        ``ConfusionMatrix.summary`` without the matrix; None if a process did not come to its end.

    Raises:
        DataError: no pixel of these samples has a label that counts.
    """
    share = dataset.share(process.rank, process.world_size)
    matrix = ConfusionMatrix(dataset.labels.num_classes, dataset.ignore_label, process.device)
    samples = load_samples(share, num_workers, pin_memory=process.device.type == "cuda")
    with process.all_or_none():
        done = count_predictions(predict, until(samples), matrix, process)
    if process.max(done < len(share)):
        return None
    matrix.add_processes(process)
    if not matrix.counts.any():  # in all processes alike
        error = DataError("no labelled pixel in the images of --val-every, so there are no scores")
        process.raise_if_any_failed(error)
    scores = matrix.summary(dataset.labels.names)
    del scores["confusion_matrix"]
    return scores


@torch.inference_mode()
def count_predictions(
    predict: Predict,
    samples: Iterable[Sample],
    matrix: ConfusionMatrix,
    process: Process,
    save: Save | None = None,
) -> int:
    """Predict every sample, count it in the matrix if it has a label, and hand it to ``save``.

    Counts are those of this process; ``ConfusionMatrix.add_processes`` adds those of the others.

    Returns:
        The number of samples.

    Raises:
        PredictionError: the network's output is not finite, so that no class can be predicted.
    """
    done = 0
    for done, sample in enumerate(samples, start=1):  # noqa: B007
        image = sample.image.to(process.device, non_blocking=True).unsqueeze(0)
        try:
            prediction = class_ids(predict(image, sample.scored))[0]
        except PredictionError as error:
            raise PredictionError(f"{sample.name}: {error}") from None
        if sample.label is not None:
            matrix.update(prediction, sample.label.to(process.device, non_blocking=True))
        if save:
            save(sample, prediction.cpu().numpy())
    return done
