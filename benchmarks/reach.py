"""What rounds of criss-cross attention are for: carrying what lies anywhere in the image to each position.

    python benchmarks/reach.py [--steps 800] [--seeds 1,2,3]

A head alone is trained on maps of noise, 16×16 positions. At one random position of each stand a mark and one
of four classes, and every position shall say that class. A head's three 3×3 convolutions carry it 3 positions
far, one round of attention along the rows and columns that they reach, two rounds everywhere. The table has
the share of right answers on maps not seen in training, by where the position lies from the mark; chance is
0.25.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from networks import HEADS, NORMS
from utils.arguments import number

SIDE, CHANNELS, CLASSES, BATCH = 16, 128, 4, 16
NEAR = 3  # positions that three 3×3 convolutions reach
RATE = 2e-3  # the largest of a one-cycle schedule of AdamW
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"R = {rounds}": ("ccnet", {"recurrence": rounds}) for rounds in range(4)},
    "non-local": ("nonlocal", {}),
    "pyramid pooling": ("pspnet", {}),
    "ASPP": ("deeplabv3", {}),
    "large kernels (GCN)": ("gcn", {}),
}
PLACES = ("within 3", "within 3 of its row or column", "elsewhere")


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B,C,h,w), their classes (B,), and the distances from the mark, (2,B,h,w): in rows, in columns."""
    images = torch.arange(BATCH)
    maps = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    maps[:, : 1 + CLASSES] = 0
    classes = torch.randint(CLASSES, (BATCH,), generator=generator)
    mark = torch.randint(SIDE, (2, BATCH), generator=generator)
    maps[images, 0, mark[0], mark[1]] = maps[images, 1 + classes, mark[0], mark[1]] = 3
    along = (torch.arange(SIDE) - mark[..., None]).abs()
    away = torch.stack([along[0, :, :, None].expand(-1, -1, SIDE), along[1, :, None].expand(-1, SIDE, -1)])
    return maps, classes, away


def train(name: str, options: dict[str, Any], seed: int, steps: int) -> torch.nn.Module:
    """A trained head in evaluation mode."""
    torch.manual_seed(seed)
    head: torch.nn.Module = HEADS[name](CHANNELS, CLASSES, NORMS["abn"], **options)
    optimizer = torch.optim.AdamW(head.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        maps, classes, _ = draw(generator)
        optimizer.zero_grad()
        F.cross_entropy(head(maps)["out"], everywhere(classes)).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def everywhere(classes: Tensor) -> Tensor:
    """(B,) → (B,h,w)."""
    return classes[:, None, None].expand(-1, SIDE, SIDE)


@torch.no_grad()
def accuracy(head: torch.nn.Module, batches: int = 20) -> list[float]:
    """The share of right answers at each of ``PLACES``."""
    generator = torch.Generator().manual_seed(0)  # no seed of training
    right, count = torch.zeros(len(PLACES)), torch.zeros(len(PLACES))
    for _ in range(batches):
        maps, classes, away = draw(generator)
        is_right = head(maps)["out"].argmax(1) == everywhere(classes)
        close = (away <= NEAR).sum(0)  # along how many axes
        for place, axes in enumerate((2, 1, 0)):
            right[place] += is_right[close == axes].sum()
            count[place] += (close == axes).sum()
    return (right / count).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=number(int, 3), default=800, help="of each run")
    parser.add_argument(
        "--seeds", type=lambda text: [int(number(int, 1)(x)) for x in text.split(",")], default=[1, 2, 3],
        metavar="N,N,…", help="of the runs of each setting, from 1",
    )  # fmt: skip
    arguments = parser.parse_args()
    print(f"| Head | {' | '.join(PLACES)} |\n|---|{'---|' * len(PLACES)}")
    for label, (name, options) in SETTINGS.items():
        runs = [accuracy(train(name, options, seed, arguments.steps)) for seed in arguments.seeds]
        cells = []
        for values in zip(*runs, strict=True):
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
