"""Forward and backward of In-Place ABN with the ReLU (and addition) behind it: fused, in parts, BatchNorm.

    python benchmarks/abn.py --shape 2,256,97,97 --threads 2

Times are the fastest of several interleaved runs, in milliseconds, on CUDA by events and without the host's
part; the ratio is that of the parts to fused.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import libs
from benchmarks.attention import HEAD_START, hardware
from utils.arguments import number


def in_parts(norm: nn.Module, x: Tensor, shortcut: Tensor | None) -> Tensor:
    z = norm(x)
    return F.threshold(z, 0.0, 0.0) if shortcut is None else F.relu_(z + shortcut)


def fused(norm: nn.Module, x: Tensor, shortcut: Tensor | None) -> Tensor:
    return libs.norm_relu(norm, x, shortcut)[1]


def measure(shape: tuple[int, ...], dtype: torch.dtype, add: bool, device: str, runs: int) -> None:
    def drawn() -> Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    def now() -> Any:
        if device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: Any, stop: Any) -> float:
        if device != "cuda":
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000

    inplace = libs.InPlaceABN(shape[1], activation="identity").to(device)
    candidates = {
        "fused": (fused, inplace),
        "in parts": (in_parts, inplace),
        "BatchNorm": (in_parts, nn.BatchNorm2d(shape[1]).to(device)),
    }
    best = {name: [float("inf")] * 2 for name in candidates}
    x, shortcut, grad = drawn(), drawn().requires_grad_() if add else None, drawn()
    for _ in range(runs):
        for name, (function, norm) in candidates.items():
            copied = x.clone(memory_format=torch.preserve_format).requires_grad_().clone()
            if device == "cuda":
                torch.cuda._sleep(HEAD_START)
            start = now()
            out = function(norm, copied, shortcut)
            middle = now()
            out.backward(grad)
            stop = now()
            times = (between(start, middle), between(middle, stop))
            best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
    row = "  ".join(f"{name} {1e3 * a:6.2f} {1e3 * b:6.2f}" for name, (a, b) in best.items())
    forward, backward = (best["in parts"][i] / best["fused"][i] for i in (0, 1))
    what = "add+ReLU" if add else "ReLU"
    print(f"{str(dtype).removeprefix('torch.'):<9} {what:<9} {row}  ratio {forward:.2f} {backward:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2,256,97,97", help="B,C,H,W (default: %(default)s)")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: PyTorch's)")
    parser.add_argument("--runs", type=number(int, 1), default=20, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    hardware(parser, args)
    try:
        shape = tuple(map(int, args.shape.split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        parser.error(f"--shape {args.shape}: expected B,C,H,W")
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}; ABN on {libs.backend()}; {threads}; forward, backward")
    for dtype in (torch.float32, torch.bfloat16):
        for add in (False, True):
            measure(shape, dtype, add, args.device, args.runs)


if __name__ == "__main__":
    main()
