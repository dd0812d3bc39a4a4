"""Counting what a network predicts for labelled images."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.inference import Predict
from utils.metrics import ConfusionMatrix

Sample = tuple[Tensor, Tensor | None, str]  # image (3,H,W), train ids (H,W) or None, name
Save = Callable[[str, Tensor, Tensor | None, Tensor], None]  # name, image, label, prediction (H,W) uint8


@torch.inference_mode()
def evaluate(
    predict: Predict,
    samples: Iterable[Sample],
    matrix: ConfusionMatrix,
    device: torch.device,
    save: Save | None = None,
) -> None:
    """Predict every sample, count it in the matrix and hand it to ``save``."""
    for image, label, name in samples:
        logits = predict(image.to(device, non_blocking=True).unsqueeze(0))
        prediction = logits.argmax(dim=1)[0].to(torch.uint8)
        if label is not None:
            matrix.update(prediction, label.to(device, non_blocking=True))
        if save:
            save(name, image, label, prediction.cpu())
