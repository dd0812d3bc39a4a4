"""One call from a picture to its classes: ``Predictor(checkpoint)(image)``."""

import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dataset import LabelTable, Normalization, generic_table
from evaluation.bands import Rows, class_ids
from evaluation.checkpoint import CITYSCAPES, TrainedOn, labels_of, trained_on
from evaluation.inference import Fit, multi_scale, scaled_sizes, sliding, whole
from evaluation.options import AMP
from networks import Segmenter, fold_norms, restore_model
from utils.checkpoint import load_checkpoint

WHOLE_PIXELS = 2**22  # larger pictures go through the network in tiles, see ``Predictor``
BYTES_PER_PIXEL = 800  # of the network's largest activations in fp32, stated generously


class Predictor:
    """Pictures in, train ids out, by a checkpoint or a network.

    A picture goes through the network whole if it has at most 2^22 pixels and half of the memory at hand is
    enough; otherwise in overlapping tiles (the reference's test protocol). Memory beside the network's own:
    the picture as floats, logits at an eighth of its size, and a band of rows of the full-size ones.

    Args:
        source: a checkpoint of ours, a state dict, or a network in memory.
        device: "auto" (a GPU if there is one), or what ``torch.device`` takes.
        scales: factors of the picture's size over which logits are averaged.
        flip: average also over the mirrored picture.
        amp: "bf16", "fp16", "off", or "auto": bf16 where the device has instructions for it.
        whole: True or False decide between the two ways above; None leaves it to size and memory.
        tile_size: (height, width) of the tiles; None: the training crop.
        batch_size: pictures of a batch, or tiles of one picture, that go through the network together.
        labels: names and colours of the classes, instead of the checkpoint's.
        num_classes: of a checkpoint without class names: accept it, with numbers for names.
        recurrence: R, in the place of the checkpoint's. A state dict does not hold it, so it is taken for 2.
        fit: what pictures are scaled to before, see ``evaluation.inference.Fit``; "auto": what the recipe of
            the checkpoint says.

    Attributes:
        names: class names, by train id.
        labels: the whole table: names, stored ids, colours.
        clip: frames of the clips that the network was trained on; 1 for images.
        fit: what pictures are scaled to before.

    Raises:
        CheckpointError: a checkpoint that cannot be read, makes no network, or names no classes.
        ValueError: an option of another kind or out of range, labels that do not fit the network.
    """

    def __init__(
        self,
        source: Path | str | nn.Module,
        device: torch.device | str = "auto",
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        amp: str = "auto",
        whole: bool | None = None,
        tile_size: tuple[int, int] | None = None,
        batch_size: int = 4,
        labels: LabelTable | None = None,
        num_classes: int | None = None,
        recurrence: int | None = None,
        fit: Fit | Literal["auto"] = "auto",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        _check_options(scales, tile_size, amp, batch_size, fit, flip, whole)
        if labels is not None and not isinstance(labels, LabelTable):
            raise ValueError(f"labels must be a LabelTable; got {type(labels).__name__}")
        self.device = torch.device(device)
        self.scales, self.flip, self.amp, self.whole = tuple(scales), flip, amp, whole
        self.batch_size = batch_size
        self._goes_whole: dict[int, bool] = {}
        if isinstance(source, nn.Module):
            if not isinstance(source, Segmenter) or recurrence is not None:
                kind = type(source).__name__
                raise ValueError(f"a network in memory must be a Segmenter and has its own R; got {kind}")
            model, trained = source, TrainedOn()
            classes = model.head.classifier.out_channels
            self.labels = labels or (CITYSCAPES if classes == 19 else generic_table(classes))
            self._takes_clips = True  # it is not known what it was trained on
        else:
            path = Path(source)
            contents = load_checkpoint(path)
            given = {} if recurrence is None else {"recurrence": recurrence}
            model, config = restore_model(contents, path, **given)
            trained = trained_on(contents, path)
            classes = config.num_classes
            self.labels = labels or labels_of(contents, path, classes, num_classes)
            self._takes_clips = trained.clip > 1
        if self.labels.num_classes != classes:
            raise ValueError(
                f"labels must be of the network's {classes} classes; got {self.labels.num_classes}"
            )
        backbone = model.backbone
        self.normalization = Normalization(backbone.mean, backbone.std, backbone.channel_order)
        self.tile_size, self.clip = tile_size or trained.crop, trained.clip
        if isinstance(fit, numbers.Integral):
            fit = int(fit)
        self.fit: Fit = trained.fit if fit == "auto" else fit
        # Normalisation layers cost nothing once they are part of the convolutions.
        self.network = fold_norms(model).float().to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels.names

    def colour(self, ids: np.ndarray) -> np.ndarray:
        """Train ids (H,W) → (H,W,3) uint8 RGB."""
        return self.labels.colour(ids)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Picture (H,W,3) uint8 RGB, or clip (T,H,W,3) → train ids (H,W) or (T,H,W), uint8.

        Raises:
            ValueError: another shape or type.
            PredictionError: the network's output is not finite.
        """
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures, or clips, of one size → the ids of each; as many as fit go through the network together.

        Raises:
            ValueError: another type, different shapes, or a clip for a network that was trained on pictures.
            PredictionError: the network's output is not finite.
        """
        images = list(images)
        for image in images:
            _check(image)
            if image.shape != images[0].shape:
                raise ValueError(f"a batch has images of one shape; got {images[0].shape} and {image.shape}")
            if image.ndim == 4 and not self._takes_clips:
                raise ValueError(
                    f"this network was trained on single pictures, (H,W,3), got {image.shape}; "
                    "predict_batch takes several"
                )
        results: list[np.ndarray] = []
        together = self._together(images[0].shape) if len(images) else 1
        predict = multi_scale(self._view, self.scales, self.flip, self.labels.mirror_pairs, self.fit)
        for start in range(0, len(images), together):
            batch = images[start : start + together]
            ids = class_ids(predict(self._normalized(batch))).cpu().numpy()
            results += list(ids.reshape(len(batch), *images[0].shape[:-1]))
        return results

    def goes_whole(self, pixels: int) -> bool:
        """Whether a picture of so many pixels, or a clip of so many in all its frames, goes whole."""
        if self.whole is not None:
            return self.whole
        if pixels not in self._goes_whole:  # decided once: the answer must not change from picture to picture
            memory = available_memory(self.device)
            fits = pixels <= WHOLE_PIXELS and pixels * BYTES_PER_PIXEL <= memory / 2
            self._goes_whole[pixels] = fits
        return self._goes_whole[pixels]

    def _together(self, shape: tuple[int, ...]) -> int:
        """How many pictures or clips of a shape go through the network at once."""
        *frames, height, width, _ = shape
        sizes = [(height, width), *scaled_sizes((height, width), self.scales, self.fit)]
        pixels = int(np.prod(frames)) * max(h * w for h, w in sizes)
        if not self.goes_whole(pixels):
            return 1
        fitting = min(WHOLE_PIXELS, available_memory(self.device) / (2 * BYTES_PER_PIXEL)) / pixels
        return max(min(self.batch_size, int(fitting)), 1)

    def _normalized(self, images: Sequence[np.ndarray]) -> Tensor:
        """Pictures → (B,3,H,W), clips → (B,3,T,H,W); some rows at a time, so that no further copy is held."""
        *frames, height, width, _ = images[0].shape
        inputs = torch.empty(len(images), 3, *frames, height, width)
        for image, target in zip(images, inputs, strict=True):
            clip = target.unsqueeze(1) if image.ndim == 3 else target
            for t, frame in enumerate(image[None] if image.ndim == 3 else image):
                for top in range(0, height, 256):
                    rows = slice(top, top + 256)
                    clip[:, t, rows] = torch.from_numpy(self.normalization(frame[rows]))
        return inputs

    def _view(self, images: Tensor, frame: int | None = None) -> Rows:
        """The prediction at one size, whole or in tiles."""
        if self.goes_whole(images[0, 0].numel()):
            return whole(self.network, self.amp)(images, frame)
        return sliding(self.network, self.tile_size, self.batch_size, self.amp)(images, frame)


def _check_options(
    scales: Any, tile_size: Any, amp: Any, batch_size: Any, fit: Any, flip: Any, whole: Any
) -> None:
    """Raise ValueError where one is of another kind or out of range."""
    if not _are_positive(scales, numbers.Real):
        raise ValueError(f"scales must be positive numbers, (1.0,) for one; got {scales}")
    if tile_size is not None and not _is_size(tile_size):
        raise ValueError(f"tile_size must be a height and a width of at least 1; got {tile_size}")
    if amp not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}; got {amp!r}")
    if not _are_positive((batch_size,), numbers.Integral):
        raise ValueError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
    is_fit = _is_size(fit) or (_are_positive((fit,), numbers.Integral) and not isinstance(fit, bool))
    if fit is not None and not is_fit and not (isinstance(fit, str) and fit == "auto"):
        raise ValueError(f"fit must be (height, width), a short side, None or 'auto'; got {fit!r}")
    for name, value, allowed in (("flip", flip, (True, False)), ("whole", whole, (True, False, None))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of a GPU, or of this machine and the control group (container)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    bounds = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        bounds += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            bounds.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # another system
    if not bounds and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        bounds.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(min(bounds, default=2**32), 0)


def _is_size(value: Any) -> bool:
    """Whether it is (height, width)."""
    return _are_positive(value, numbers.Integral) and len(value) == 2


def _are_positive(values: Any, kind: Any) -> bool:
    """Whether it is a sequence of at least one number, all of them finite and above 0."""
    if not isinstance(values, Sequence) or not values:
        return False
    return all(isinstance(x, kind) and 0 < x < math.inf for x in values)


def _check(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a numpy array of uint8; got {kind}")
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (H,W,3) or, for a clip, (T,H,W,3); got shape {image.shape}")
