"""Costs of the heads on features of 1×2048×97×97: parameters, GFLOPs, memory and time, beside the paper's.

    python benchmarks/heads.py [--device cuda] [--size 97] [--heads ccnet nonlocal …]

Only the head is measured, dropout and classifier for 19 classes included; FLOPs are counted as two for each
multiplication and addition. The paper's figures are of the context module alone, at 512 channels.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.attention import hardware, peak_mib, seconds
from networks import Head, build_model
from utils.arguments import number

CHANNELS = 2048  # of ResNet-101's last stage
# Extra GFLOPs and MB at 512×97×97 (paper, table 5), mIoU on Cityscapes val with ResNet-101 (paper, table 2).
PAPER = {
    "fcn": ("0", "0", "75.1"),
    "ccnet": ("16.6", "127", "79.8"),
    "nonlocal": ("108", "1411", "79.1"),
    "pspnet": ("", "", "78.5"),
    "deeplabv3": ("", "", "78.9"),
    "gcn": ("", "", "78.1"),
}
# What sees the image's mean, which of one image has no statistics to train on.
ONE_VALUE = {"pspnet": "context.branches.0", "deeplabv3": "context.image"}


def gflops(name: str, size: int) -> float:
    """Of one inference, counted without computing: attention as two products of matrices."""

    def criss_cross(
        query: tuple[int, ...], key: object, value: tuple[int, ...], *_: object, **__: object
    ) -> int:
        batch, _, height, width = query
        return 2 * batch * height * width * (height + width - 1) * (query[1] + value[1])

    options = {"explicit_attention": True} if name == "nonlocal" else {}
    operator = torch.ops.cc_attention.criss_cross_attention
    with torch.device("meta"):
        head = build_model(name, **options).head.eval()
        with (
            FlopCounterMode(display=False, custom_mapping={operator: criss_cross}) as counter,
            torch.no_grad(),
        ):
            head(torch.empty(1, CHANNELS, size, size))
    return counter.get_total_flops() / 1e9


def train(head: Head, x: Tensor) -> None:
    head(x)["out"].square().mean().backward()
    head.zero_grad()  # so that they count as this step's memory, not as there before the next


def infer(head: Head, x: Tensor) -> None:
    with torch.inference_mode():
        head(x)


def row(name: str, size: int, device: torch.device) -> list[str]:
    """One head's figures, as the table shows them."""
    torch.manual_seed(0)
    head = build_model(name).head.to(device, memory_format=torch.channels_last).train()
    if name in ONE_VALUE:
        head.get_submodule(ONE_VALUE[name]).eval()
    x = torch.randn(1, CHANNELS, size, size, device=device).to(memory_format=torch.channels_last)
    step = partial(train, head, x.requires_grad_())
    figures = [f"{peak_mib(step, device):.0f}", f"{seconds(step, device):.3f}"]
    step = partial(infer, head.eval(), x.detach())
    figures += [f"{peak_mib(step, device):.0f}", f"{seconds(step, device):.3f}"]
    parameters = sum(x.numel() for x in head.parameters()) / 1e6
    return [name, f"{parameters:.2f} M", f"{gflops(name, size):.1f}", *figures, *PAPER[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=number(int, 1), default=97, help="height and width of the features")
    parser.add_argument("--heads", nargs="+", choices=PAPER, default=list(PAPER), help="which heads")
    args = parser.parse_args()
    hardware(parser, args)
    columns = ("head", "parameters", "GFLOPs", "train MiB", "train s", "infer MiB", "infer s")
    print("| " + " | ".join((*columns, "paper: GFLOPs", "paper: MB", "paper: mIoU")) + " |")
    print("|" + "---|" * (len(columns) + 3))
    for name in args.heads:
        print("| " + " | ".join(row(name, args.size, torch.device(args.device))) + " |", flush=True)


if __name__ == "__main__":
    main()
