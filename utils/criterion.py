"""The training loss: cross entropy, optionally with online hard example mining, and the auxiliary head."""

import torch
from torch import Tensor
from torch.nn import functional as F

# OHEM chooses its threshold on a grid of every 8th pixel, where 64 times fewer are to be sorted.
OHEM_STRIDE = 8


class Criterion:
    """loss(out) + aux_weight · cross entropy(aux). See ``build_criterion``."""

    def __init__(
        self, ohem: bool, ohem_thres: float, ohem_keep: int, aux_weight: float, ignore_index: int
    ) -> None:
        self.ohem, self.ohem_thres, self.ohem_keep = ohem, ohem_thres, ohem_keep
        self.aux_weight, self.ignore_index = aux_weight, ignore_index

    def __call__(self, outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        """Logits {"out": (B,C,h,w), "aux": (B,C,h,w) or absent} and train ids (B,H,W) → scalar."""
        target = target.long()
        loss = self._head_loss(_upsample(outputs["out"], target), target)
        if "aux" in outputs:
            aux = _upsample(outputs["aux"], target)
            entropy = F.cross_entropy(aux, target, ignore_index=self.ignore_index, reduction="none")
            loss = loss + self.aux_weight * _mean(entropy, target != self.ignore_index)
        return loss

    def _head_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        kept = target != self.ignore_index
        if self.ohem:
            with torch.no_grad():
                threshold = ohem_threshold(logits, target, self.ohem_thres, self.ohem_keep, self.ignore_index)
                kept &= torch.exp(-entropy) <= threshold  # exp(-CE) is the true class's probability
        return _mean(entropy, kept)


def build_criterion(
    ohem: bool = False,
    ohem_thres: float = 0.7,
    ohem_keep: int = 100000,
    aux_weight: float = 0.4,
    ignore_index: int = 255,
) -> Criterion:
    """The reference's loss (its criterion.py and OhemCrossEntropy2d), without leaving the device.

    Logits are up-sampled to the label's size (bilinear, corners aligned). Where no pixel counts, a whole
    crop being ignored, the loss is 0 and so are its gradients.

    Args:
        ohem: leave out the pixels of the head that are easy: those whose true class has a probability
            above the threshold.
        ohem_thres: the least threshold, in (0, 1].
        ohem_keep: about how many pixels of a full-resolution batch are kept at least.
        aux_weight: weight of the auxiliary head's plain cross entropy.
        ignore_index: label that does not count.

    Returns:
        A callable on (outputs: {"out": logits, "aux": logits}, target (B,H,W)).
    """
    return Criterion(ohem, ohem_thres, ohem_keep, aux_weight, ignore_index)


def ohem_threshold(logits: Tensor, target: Tensor, thres: float, keep: int, ignore_index: int) -> Tensor:
    """The probability of the true class up to which a pixel counts as hard: a scalar tensor.

    The reference zooms probabilities (linear) and labels (nearest) to 1/8 with scipy and takes there the
    (keep // 64)-th smallest probability of the true class, if that is above ``thres``; everything is kept
    if there are no more valid labels than that. Here only the grid's pixels are computed.

    Args:
        logits: (B,C,H,W) at the label's size.
        target: (B,H,W) train ids.
    """
    keep_on_grid = keep // OHEM_STRIDE**2
    (top, bottom, down, near_y), (left, right, across, near_x) = (
        _grid(size, logits.device) for size in target.shape[1:]
    )
    labels = target[:, near_y][:, :, near_x]  # (B,gh,gw)
    valid = labels != ignore_index
    class_of = labels.masked_fill(~valid, 0).unsqueeze(1)

    def probability(rows: Tensor, columns: Tensor) -> Tensor:
        """Of the grid's labels at the given pixels: (B,gh,gw)."""
        corner = logits[:, :, rows][:, :, :, columns].to(precision)
        return corner.softmax(dim=1).gather(1, class_of).squeeze(1)

    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    down, across = down.to(precision).unsqueeze(1), across.to(precision)
    upper = probability(top, left) * (1 - across) + probability(top, right) * across
    lower = probability(bottom, left) * (1 - across) + probability(bottom, right) * across
    true_class = (upper * (1 - down) + lower * down).masked_fill(~valid, 2.0).flatten()  # invalid ones last

    one = true_class.new_ones(())
    if keep_on_grid >= true_class.numel():
        return one
    if keep_on_grid == 0:
        hardest = true_class.new_full((), thres)
    else:
        hardest = true_class.kthvalue(keep_on_grid).values.clamp(min=thres)
    return torch.where(valid.sum() > keep_on_grid, hardest, one)


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scipy.ndimage.zoom's grid of round(size / 8) points with both ends on the outermost pixels.

    Returns:
        For each point the pixel below it, the one above, how far it is from the lower to the upper one
        (fp64), and the nearest one.
    """
    points = round(size / OHEM_STRIDE)
    step = (size - 1) / (points - 1) if points > 1 else 1.0
    position = torch.arange(points, dtype=torch.float64, device=device) * step
    low = position.floor().long().clamp(max=size - 1)
    nearest = (position + 0.5).floor().long().clamp(max=size - 1)
    return low, (low + 1).clamp(max=size - 1), position - low, nearest


def _upsample(logits: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=True)


def _mean(entropy: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted pixels, 0 where there are none."""
    return torch.where(counted, entropy, 0).sum() / counted.sum().clamp(min=1)
