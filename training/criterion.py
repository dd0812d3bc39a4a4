"""The training loss: cross entropy, hard example mining, auxiliary head, category consistency."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.category_loss import ONE_PROCESS, CategoryConsistentLoss
from utils.distributed import Process, sum_on_first_device

# OHEM chooses its threshold on a grid of every 8th pixel, where there are 64 times fewer to sort.
OHEM_STRIDE = 8

Outputs = dict[str, Tensor]  # logits "out" (B,C,h,w); in training also "aux" and, if asked for, "embedding"
Part = tuple[Outputs, Tensor]  # a network's outputs and train ids (B,H,W), both on one device
Losses = dict[str, Tensor]  # scalars by the name they are logged with; "loss" is the one to differentiate


class Criterion:
    """loss(out) + aux_weight · cross entropy(aux) + category consistent loss. See ``build_criterion``.

    A subclass with another term overrides ``batch_losses`` and adds to the dict that it returns.
    """

    def __init__(
        self,
        ohem: bool,
        ohem_thres: float,
        ohem_keep: int,
        aux_weight: float,
        ignore_index: int,
        category_loss: CategoryConsistentLoss | None = None,
        align_corners: bool = True,
    ) -> None:
        self.ohem, self.ohem_thres, self.ohem_keep = ohem, ohem_thres, ohem_keep
        self.aux_weight, self.ignore_index = aux_weight, ignore_index
        self.category_loss, self.align_corners = category_loss, align_corners

    def __call__(self, outputs: Outputs, target: Tensor) -> Losses:
        """Logits {"out": (B,C,h,w), "aux": (B,C,h,w) or absent} and train ids (B,H,W) → losses."""
        return self.batch_losses([(outputs, target)])

    def batch_losses(self, parts: Sequence[Part], process: Process = ONE_PROCESS) -> Losses:
        """The losses of a batch that is spread over devices and processes, as if it were in one place.

        Pixels are mined and counted over the whole batch, so the number of devices changes nothing. Only
        what decides that is exchanged: 1/64 of the pixels' probabilities, and counts.

        Args:
            parts: outputs and target of each device of this process.
            process: with whom the batch is shared; all its processes have parts of one size.

        Returns:
            Scalars on the first part's device: "loss", "loss_head", "loss_aux" (0 without auxiliary logits),
            "kept_pixels" (share of the labelled pixels that the head learns from), and the terms of the
            category consistent loss. Their means over the processes are those of the whole batch.
        """
        if len(parts) > 1 and self.category_loss is not None:
            parts = [(_backward_at_once(outputs), target) for outputs, target in parts]
        heads = [self._pixels(outputs["out"], target) for outputs, target in parts]
        auxiliary = [self._pixels(outputs["aux"], target) for outputs, target in parts if "aux" in outputs]
        kept = self._hard_masks(heads, process) if self.ohem else [pixels.labelled for pixels in heads]
        counts = sum_on_first_device(
            [torch.stack((mask.sum(), x.labelled.sum())) for x, mask in zip(heads, kept, strict=True)]
        )
        if process.world_size > 1:
            counts = process.all_gather(counts).sum(0)
        kept_count, labelled_count = counts.clamp(min=1)

        def mean(total: Tensor, count: Tensor) -> Tensor:
            """This process's part of the mean, times the number of processes, which averaging takes away."""
            return total / count.to(total.device) * process.world_size

        head = [mean(x.sum(mask), kept_count) for x, mask in zip(heads, kept, strict=True)]
        aux = [mean(x.sum(x.labelled), labelled_count) for x in auxiliary]
        # One scalar for each device, so that its backward pass begins in one place.
        totals = [h + self.aux_weight * a for h, a in zip(head, aux, strict=True)] if aux else head
        losses = {
            "loss": sum_on_first_device(totals),
            "loss_head": sum_on_first_device(head).detach(),
            "loss_aux": sum_on_first_device(aux).detach() if aux else torch.zeros_like(totals[0]),
            "kept_pixels": counts[0] / labelled_count,
        }
        if self.category_loss is not None:
            total, terms = self.category_loss.batch_losses(parts, process)
            losses |= terms
            losses["loss"] = losses["loss"] + total.to(losses["loss"].device)
        return losses

    def _pixels(self, logits: Tensor, target: Tensor) -> "_Pixels":
        return _Pixels(logits, target, self.ignore_index, self.align_corners)

    @torch.no_grad()
    def _hard_masks(self, heads: Sequence["_Pixels"], process: Process) -> list[Tensor]:
        """For each part the mask (B,H,W) of its hard pixels."""
        grids = [pixels.on_grid() for pixels in heads]
        grid = torch.cat([part.to(grids[0].device) for part in grids])
        if process.world_size > 1:
            grid = process.all_gather(grid).flatten()
        threshold = ohem_threshold(grid, self.ohem_thres, self.ohem_keep)
        return [pixels.hard_mask(threshold) for pixels in heads]


class _Identity(torch.autograd.Function):
    """Its backward pass waits for the gradients of all outputs."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _backward_at_once(outputs: Outputs) -> Outputs:
    """The outputs of a replica, whose backward pass starts when the gradients of all of them are there.

    The category loss couples devices. Without this, one replica could go into a branch while another waits
    in the next one, and synchronised normalisation wants all of them at the same layer.
    """
    return dict(zip(outputs, _Identity.apply(*outputs.values()), strict=True))


class _UpSample(torch.autograd.Function):
    """``F.interpolate``, bilinear, (B,C,h,w) → (B,C,H,W).

    Its gradient as two products of matrices: PyTorch's own takes 4 ms of a step for each head on an H100, and
    is not deterministic on a GPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.align_corners = inputs
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        down, across = (
            _bilinear_weights(small, large, ctx.align_corners, grad)
            for small, large in zip(ctx.size, grad.shape[2:], strict=True)
        )
        with torch.autocast(grad.device.type, enabled=False):
            return down.T @ (grad @ across), None, None


def _bilinear_weights(small: int, large: int, align_corners: bool, like: Tensor) -> Tensor:
    """What each of ``large`` positions takes of each of ``small``: (large, small)."""
    position = torch.arange(large, device=like.device, dtype=like.dtype)
    if align_corners:
        position *= (small - 1) / max(large - 1, 1)
    else:  # pixels are squares, of which the centres are compared
        position = ((position + 0.5) * (small / large) - 0.5).clamp(0, small - 1)
    own = torch.arange(small, device=like.device, dtype=like.dtype)
    return (1 - (position.unsqueeze(1) - own).abs()).clamp(min=0)


class _Pixels:
    """The pixels of one part, and what logits at 1/8 say of their true classes."""

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> None:
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        # Contiguous, since log_softmax wants so: the large map would be copied, the small one is cheap to.
        logits = _UpSample.apply(logits.contiguous(), target.shape[1:], align_corners)
        self.labelled = target != ignore_index  # (B,H,W)
        self.true_class = target.long().masked_fill(~self.labelled, 0)
        self.log_probability = logits.log_softmax(dim=1)  # (B,C,H,W)
        # As F.cross_entropy, whose backward pass is not deterministic on a GPU; gather's is.
        self.cross_entropy = -self.log_probability.gather(1, self.true_class.unsqueeze(1)).squeeze(1)

    def sum(self, mask: Tensor) -> Tensor:
        """Cross entropy added up over the pixels of a mask (B,H,W)."""
        return torch.where(mask, self.cross_entropy, 0).sum()

    def hard_mask(self, threshold: Tensor) -> Tensor:
        """The labelled pixels (B,H,W) whose true class is no more probable than that, or NaN."""
        return self.labelled & ~(torch.exp(-self.cross_entropy) > threshold.to(self.cross_entropy.device))

    def on_grid(self) -> Tensor:
        """The true classes' probabilities on OHEM's grid: (N,), 2 where there is no label.

        The reference zooms probabilities (linear) and labels (nearest) to 1/8 with scipy. Here only the
        grid's pixels are computed.
        """
        (top, bottom, down, near_y), (left, right, across, near_x) = (
            _grid(size, self.cross_entropy.device) for size in self.cross_entropy.shape[1:]
        )
        class_of = self.true_class[:, near_y][:, :, near_x].unsqueeze(1)  # (B,1,gh,gw)

        def probability(rows: Tensor, columns: Tensor) -> Tensor:
            """Of the grid's labels at the given pixels: (B,gh,gw)."""
            return self.log_probability[:, :, rows][:, :, :, columns].gather(1, class_of).squeeze(1).exp()

        down, across = down.to(self.cross_entropy.dtype).unsqueeze(1), across.to(self.cross_entropy.dtype)
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
    ccl: bool = False,
    ccl_kind: str = "piecewise",
    align_corners: bool = True,
    kind: type[Criterion] = Criterion,
) -> Criterion:
    """The reference's loss (its criterion.py and OhemCrossEntropy2d), without leaving the device.

    Logits are up-sampled to the label's size (bilinear). Where no pixel counts, a whole crop being ignored,
    the loss is 0 and so are its gradients.

    Args:
        ohem: leave out the pixels of the head that are easy: those whose true class has a probability
            above the threshold.
        ohem_thres: the least threshold, in (0, 1].
        ohem_keep: about how many pixels of a full-resolution batch are kept at least.
        aux_weight: weight of the auxiliary head's plain cross entropy.
        ignore_index: label that does not count.
        ccl: add the category consistent loss of outputs["embedding"] (TPAMI 2020, section 3.4).
        ccl_kind: its intra-class distance, "piecewise" or "quadratic".
        align_corners: how logits are up-sampled; the reference aligns corners.
        kind: a subclass of Criterion with a further term.

    Returns:
        A callable on (outputs: {"out": logits, "aux": logits}, target (B,H,W)) that returns a dict.
    """
    category_loss = CategoryConsistentLoss(ignore_index, ccl_kind) if ccl else None
    return kind(ohem, ohem_thres, ohem_keep, aux_weight, ignore_index, category_loss, align_corners)


# Other losses by name: a recipe's ``criterion`` chooses one. Keywords are those of ``build_criterion``.
CRITERIA: dict[str, Callable[..., Criterion]] = {"default": build_criterion}


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
        # kthvalue and the like are not deterministic on a GPU.
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
