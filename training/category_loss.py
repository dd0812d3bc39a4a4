"""The category consistent loss (TPAMI 2020, section 3.4): features of a class close, classes apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.distributed import Process, sum_on_first_device

KINDS = ("piecewise", "quadratic")
INTRA_MARGIN, INTER_MARGIN = 0.5, 1.5  # δ_v and δ_d
INTRA_WEIGHT, INTER_WEIGHT, NORM_WEIGHT = 1.0, 1.0, 0.001  # α, β and γ
CCL_CHANNELS = 16  # of the embedding, a 1×1 convolution of the head's features
ONE_PROCESS = Process((torch.device("cpu"),))
# Below it a squared distance has no direction to follow. Both distance terms are flat or masked there.
TINY = 1e-12


def category_consistent_loss(
    embedding: Tensor, target: Tensor, ignore_index: int = 255, kind: str = "piecewise"
) -> Tensor:
    """α·l_var + β·l_dis + γ·l_reg of a batch.

    With the mean embedding μ of each class that occurs, over all pixels of the batch, and d = ‖μ_c - h_i‖:

        l_var = mean over classes of the mean over their pixels of φ(d)
        φ(d) = 0 if d ≤ δ_v;  (d - δ_v)² if d ≤ δ_d;  d - δ_d + (δ_d - δ_v)² beyond ("quadratic": (d - δ_v)²)
        l_dis = mean over ordered pairs a ≠ b of max(0, 2δ_d - ‖μ_a - μ_b‖)²;  0 with fewer than two classes
        l_reg = mean ‖μ_c‖

    Args:
        embedding: (B,D,h,w); half types are computed in fp32.
        target: train ids 0 … 255, (B,h,w), or a larger (B,H,W) that is sampled at the embedding's positions.
        ignore_index: label that does not count.
        kind: "piecewise", the paper's φ, or "quadratic".

    Returns:
        A scalar; 0, with gradients of 0, where no label counts.

    Raises:
        ValueError: another kind, or a label below 0 or above 255.
    """
    beyond = target[(target != ignore_index) & ((target < 0) | (target > 255))]
    if len(beyond):
        raise ValueError(f"labels must be 0 … 255, or ignore_index; got {beyond[0].item()}")
    total, _ = CategoryConsistentLoss(ignore_index, kind).batch_losses([({"embedding": embedding}, target)])
    return total


class CategoryConsistentLoss:
    """``category_consistent_loss`` of a batch that is spread over devices and processes.

    Means and present classes are those of the whole batch: the sums of each class are added up over all
    devices and processes, with gradients. Parts of a step that are accumulated one after another each have
    their own.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, ignore_index: int = 255, kind: str = "piecewise") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}; got {kind!r}")
        self.ignore_index, self.kind = ignore_index, kind

    def batch_losses(
        self, parts: Sequence[tuple[dict[str, Tensor], Tensor]], process: Process = ONE_PROCESS
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and its three terms to log.

        Args:
            parts: outputs with "embedding" (B,D,h,w), and train ids (B,H,W), of each device.
            process: with whom the batch is shared.

        Returns:
            Scalars on the first part's device, whose means over the processes are those of the batch.
        """
        with torch.autocast(parts[0][1].device.type, enabled=False):  # products in fp32
            return self._batch_losses(parts, process)

    def _batch_losses(
        self, parts: Sequence[tuple[dict[str, Tensor], Tensor]], process: Process
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # 256 classes where there are no logits to count them by: a label is 8 bits wide.
        classes = parts[0][0]["out"].shape[1] if "out" in parts[0][0] else 256
        pixels = [self._pixels(outputs["embedding"], target, classes) for outputs, target in parts]
        # Products with one-hot labels, since scattered additions are not deterministic on a GPU.
        sums = [
            one_hot.T @ torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x, one_hot in pixels
        ]  # (C,D+1) each
        total = process.differentiable_sum(sum_on_first_device(sums))
        counts = total[:, -1].detach()
        present = counts > 0
        means = total[:, :-1] / counts.clamp(min=1).unsqueeze(1)
        num_present = present.sum().clamp(min=1)

        spread = sum_on_first_device(
            [one_hot.T @ self._spread(x, one_hot @ means.to(x.device)) for x, one_hot in pixels]
        )  # (C,)
        # This process's part of the sum, times the number of processes, which averaging takes away.
        intra = (spread / counts.clamp(min=1)).sum() / num_present * process.world_size
        pairs = present.unsqueeze(0) & present.unsqueeze(1)
        pairs.fill_diagonal_(False)
        distance = _norm(means.unsqueeze(0) - means.unsqueeze(1))
        inter = torch.where(pairs, F.relu(2 * INTER_MARGIN - distance) ** 2, 0).sum() / pairs.sum().clamp(
            min=1
        )
        norm = torch.where(present, _norm(means), 0).sum() / num_present
        loss = INTRA_WEIGHT * intra + INTER_WEIGHT * inter + NORM_WEIGHT * norm
        terms = {"loss_ccl_var": intra, "loss_ccl_dis": inter, "loss_ccl_reg": norm}
        return loss, {name: term.detach() for name, term in terms.items()}

    def _pixels(self, embedding: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Embeddings (N,D) in fp32 or fp64, and one-hot labels (N,C), all 0 where the label is ignored."""
        if embedding.dtype in (torch.float16, torch.bfloat16):
            embedding = embedding.float()
        labels = labels_at(target, embedding.shape[2], embedding.shape[3])
        class_ids = torch.arange(classes, device=labels.device)
        one_hot = (labels.reshape(-1, 1) == class_ids) & (labels.reshape(-1, 1) != self.ignore_index)
        return embedding.permute(0, 2, 3, 1).flatten(0, 2), one_hot.to(embedding.dtype)

    def _spread(self, embedding: Tensor, mean: Tensor) -> Tensor:
        """φ of each embedding's distance to the mean of its class: (N,D), (N,D) → (N,)."""
        distance = _norm(embedding - mean)
        quadratic = F.relu(distance - INTRA_MARGIN) ** 2
        if self.kind == "quadratic":
            return quadratic
        linear = distance - INTER_MARGIN + (INTER_MARGIN - INTRA_MARGIN) ** 2
        return torch.where(distance > INTER_MARGIN, linear, quadratic)


def labels_at(target: Tensor, height: int, width: int) -> Tensor:
    """Labels (B,H,W) at the positions of a (height,width) map, whose corners are those of the labels."""
    rows, columns = (
        _nearest(size, points, target.device)
        for size, points in zip(target.shape[1:], (height, width), strict=True)
    )
    return target[:, rows][:, :, columns]


def _nearest(size: int, points: int, device: torch.device) -> Tensor:
    """For each of ``points`` positions with both ends on the outermost pixels, the nearest of ``size``."""
    step = (size - 1) / (points - 1) if points > 1 else 0.0
    position = torch.arange(points, dtype=torch.float64, device=device) * step
    return (position + 0.5).floor().long().clamp(max=size - 1)


def _norm(x: Tensor) -> Tensor:
    """‖x‖ over the last dimension, whose gradient at 0 is 0."""
    return x.square().sum(dim=-1).clamp(min=TINY).sqrt()
