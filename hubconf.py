"""``torch.hub.load(folder, "ccnet", source="local", checkpoint=…)``: a checkpoint as a predictor."""

from pathlib import Path
from typing import Any

from evaluation import Predictor
from training.snapshots import find_checkpoint

dependencies = ["torch", "numpy", "cv2", "PIL"]


def ccnet(checkpoint: str | Path, device: str = "auto", **options: Any) -> Predictor:
    """A predictor: picture (H,W,3) uint8 RGB in, train ids (H,W) uint8 out; see ``evaluation.Predictor``.

    Args:
        checkpoint: a file, or a folder to take the newest from.
        device: "auto", "cpu", "cuda" …
        options: scales, flip, amp, whole, tile_size, batch_size, labels, num_classes, recurrence, fit.
    """
    return Predictor(find_checkpoint(Path(checkpoint)), device, **options)
