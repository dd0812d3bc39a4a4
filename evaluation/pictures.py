"""Pictures of predictions: colours, stored ids, and panels beside image and label."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from dataset import Batch, LabelTable, Normalization, Sample
from evaluation.prediction_files import write_picture

Save = Callable[[Sample, np.ndarray], None]  # sample, predicted train ids (H,W) uint8


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Pictures (H,W,3) uint8 of one height, with a white gap of 1/64 of the height between them."""
    gap = np.full((pictures[0].shape[0], max(pictures[0].shape[0] // 64, 2), 3), 255, np.uint8)
    row = [part for picture in pictures for part in (gap, picture)][1:]
    return np.concatenate(row, axis=1)


def panels(
    batch: Batch,
    logits: Tensor,
    count: int,
    labels: LabelTable,
    normalization: Normalization,
    align_corners: bool = True,
) -> list[np.ndarray]:
    """Image, label and prediction side by side, (H,W,3) uint8 RGB, of the first samples of a training batch.

    Args:
        logits: (b,N,h,w); of clips, one for each frame.
        count: how many samples at most; of a clip, its first frame.
        align_corners: how the network's logits are enlarged.
    """
    images, targets = (
        x if batch.labels.dim() == 3 else x.select(-3, 0) for x in (batch.images, batch.labels)
    )
    logits = logits[:: len(batch.labels.flatten(0, -3)) // len(targets)][:count].float()
    logits = F.interpolate(logits, targets.shape[1:], mode="bilinear", align_corners=align_corners)
    return [
        side_by_side(
            normalization.to_rgb(images[index].numpy()),
            labels.colour(targets[index].numpy()),
            labels.colour(prediction),
        )
        for index, prediction in enumerate(logits.argmax(dim=1).cpu().numpy())
    ]


def prediction_writer(directory: Path, labels: LabelTable, normalization: Normalization) -> Save:
    """A function that writes a prediction as colours, as stored label ids, and beside image and label.

    Files are ``colour/<name>.png``, ``ids/<name>.png`` and ``panels/<name>.png``.

    Raises:
        OutputError: (also the function) a file cannot be written.
    """

    def save(sample: Sample, prediction: np.ndarray) -> None:
        colour = labels.colour(prediction)
        target = [] if sample.label is None else [labels.colour(sample.label.numpy())]
        write_picture(directory / "colour" / f"{sample.name}.png", colour)
        write_picture(directory / "ids" / f"{sample.name}.png", labels.decode(prediction))
        image = sample.image if sample.image.dim() == 3 else sample.image[:, sample.scored]
        picture = side_by_side(normalization.to_rgb(image.numpy()), *target, colour)
        write_picture(directory / "panels" / f"{sample.name}.png", picture)

    return save
