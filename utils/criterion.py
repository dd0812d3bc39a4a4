"""The training loss: cross entropy, optionally with online hard example mining, and the auxiliary head."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# OHEM chooses its threshold on a grid of every 8th pixel, where 64 times fewer are to be sorted.
OHEM_STRIDE = 8

Part = tuple[dict[str, Tensor], Tensor]  # logits {"out": (B,C,h,w), "aux": …}, train ids (B,H,W)
Gather = Callable[[Tensor], Tensor]  # a vector (N,) of this process → (P,N) of all P that share the batch


class Losses(NamedTuple):
    """Of one process; their means over the processes that share a batch are those of the batch."""

    total: Tensor  # to be differentiated
    head: Tensor
    aux: Tensor
    kept: Tensor  # share of the labelled pixels that the head learns from


class Criterion:
    """loss(out) + aux_weight · cross entropy(aux). See ``build_criterion``."""

    def __init__(
        self, ohem: bool, ohem_thres: float, ohem_keep: int, aux_weight: float, ignore_index: int
    ) -> None:
        self.ohem, self.ohem_thres, self.ohem_keep = ohem, ohem_thres, ohem_keep
        self.aux_weight, self.ignore_index = aux_weight, ignore_index

    def __call__(self, outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        """Logits {"out": (B,C,h,w), "aux": (B,C,h,w) or absent} and train ids (B,H,W) → scalar."""
        return self.over([(outputs, target)]).total

    def over(self, parts: Sequence[Part], gather: Gather | None = None) -> Losses:
        """The losses of a batch that is spread over devices and processes: as if it were in one place.

        Pixels are mined and counted over the whole batch, so the number of devices changes nothing. Only
        what decides that is exchanged: 1/64 of the pixels' probabilities, and counts.

        Args:
            parts: outputs and target of each device of this process; the result is on the first's.
            gather: stacks the vectors of all processes, which must have parts of one size; None: one process.
        """
        heads = [_Pixels(outputs["out"], target, self.ignore_index) for outputs, target in parts]
        auxiliary = [
            _Pixels(outputs["aux"], target, self.ignore_index)
            for outputs, target in parts
            if "aux" in outputs
        ]
        kept = self._mined(heads, gather) if self.ohem else [pixels.labelled for pixels in heads]
        counts = _added(
            [torch.stack((mask.sum(), x.labelled.sum())) for x, mask in zip(heads, kept, strict=True)]
        )
        processes = 1
        if gather is not None:
            every = gather(counts)
            counts, processes = every.sum(0), len(every)
        kept_count, labelled_count = counts.clamp(min=1)

        def mean(added: Tensor, count: Tensor) -> Tensor:
            """This process's part of the mean, times the number of processes, which averaging takes away."""
            return added / count.to(added.device) * processes

        head = [mean(x.sum(mask), kept_count) for x, mask in zip(heads, kept, strict=True)]
        aux = [mean(x.sum(x.labelled), labelled_count) for x in auxiliary]
        # One scalar for each device, so that its backward pass begins in one place.
        totals = [h + self.aux_weight * a for h, a in zip(head, aux, strict=True)] if aux else head
        return Losses(
            total=_added(totals),
            head=_added(head).detach(),
            aux=_added(aux).detach() if aux else torch.zeros_like(totals[0]),
            kept=counts[0] / labelled_count,
        )

    @torch.no_grad()
    def _mined(self, heads: Sequence["_Pixels"], gather: Gather | None) -> list[Tensor]:
        """For each part the mask (B,H,W) of its hard pixels."""
        grids = [pixels.on_grid() for pixels in heads]
        grid = torch.cat([part.to(grids[0].device) for part in grids])
        if gather is not None:
            grid = gather(grid).flatten()
        threshold = ohem_threshold(grid, self.ohem_thres, self.ohem_keep)
        return [pixels.up_to(threshold) for pixels in heads]


class _Pixels:
    """The pixels of one part, and what logits at 1/8 say of their true classes."""

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int) -> None:
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=True)
        self.labelled = target != ignore_index  # (B,H,W)
        self.true_class = target.long().masked_fill(~self.labelled, 0)
        self.log_probability = logits.log_softmax(dim=1)  # (B,C,H,W)
        # As F.cross_entropy, whose backward pass has no repeatable form on a GPU; gather's has one.
        self.entropy = -self.log_probability.gather(1, self.true_class.unsqueeze(1)).squeeze(1)

    def sum(self, mask: Tensor) -> Tensor:
        """Cross entropy added up over the pixels of a mask (B,H,W)."""
        return torch.where(mask, self.entropy, 0).sum()

    def up_to(self, threshold: Tensor) -> Tensor:
        """The labelled pixels (B,H,W) whose true class is no more probable than that, or NaN."""
        return self.labelled & ~(torch.exp(-self.entropy) > threshold.to(self.entropy.device))

    def on_grid(self) -> Tensor:
        """The true classes' probabilities on OHEM's grid: (N,), 2 where there is no label.

        The reference zooms probabilities (linear) and labels (nearest) to 1/8 with scipy. Here only the
        grid's pixels are computed.
        """
        (top, bottom, down, near_y), (left, right, across, near_x) = (
            _grid(size, self.entropy.device) for size in self.entropy.shape[1:]
        )
        class_of = self.true_class[:, near_y][:, :, near_x].unsqueeze(1)  # (B,1,gh,gw)

        def probability(rows: Tensor, columns: Tensor) -> Tensor:
            """Of the grid's labels at the given pixels: (B,gh,gw)."""
            return self.log_probability[:, :, rows][:, :, :, columns].gather(1, class_of).squeeze(1).exp()

        down, across = down.to(self.entropy.dtype).unsqueeze(1), across.to(self.entropy.dtype)
        upper = probability(top, left) * (1 - across) + probability(top, right) * across
        lower = probability(bottom, left) * (1 - across) + probability(bottom, right) * across
        labelled = self.labelled[:, near_y][:, :, near_x]
        return (upper * (1 - down) + lower * down).masked_fill(~labelled, 2.0).flatten()


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


def ohem_threshold(grid: Tensor, thres: float, keep: int) -> Tensor:
    """The probability of the true class up to which a pixel counts as hard: a scalar tensor.

    The (keep // 64)-th smallest probability of the grid, if that is above ``thres``; everything is kept if
    there are no more labels than that.

    Args:
        grid: probabilities of the true class on every 8th pixel (N,), 2 where there is no label.
    """
    keep_on_grid = keep // OHEM_STRIDE**2
    one = grid.new_ones(())
    if keep_on_grid >= len(grid):
        return one
    if keep_on_grid == 0:
        hardest = grid.new_full((), thres)
    else:
        # kthvalue and the like have no repeatable form on a GPU.
        hardest = grid.topk(keep_on_grid, largest=False).values[-1].clamp(min=thres)
    return torch.where((grid < 2).sum() > keep_on_grid, hardest, one)


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


def _added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of several devices, on the first one's."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor.to(total.device)
    return total
