"""Criss-cross attention beside what a user would pick instead: time, memory, FLOPs and ratios in one run.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --dtype bfloat16 --batch 8
    python benchmarks/attention.py --frames 5        clips: attention along time as well

Timings are medians of rounds in which the formulations take turns, so that a disturbance hits them all. On
CUDA a round is several calls one after another, timed by events: the host's time for launches is not in it.
"MiB" is the peak above the inputs. Ratios are over the tensor formulation, the usual public one. The floor is
what the machine's own rates allow: the FLOPs at the speed of a large matrix product, or reading the inputs
and writing the results once at the speed of a copy, whichever takes longer.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cc_attention import backend, chunked, criss_cross_attention
from utils.arguments import number, size

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensor_formulation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Batched products on permuted contiguous copies, -inf on the diagonal, cat, softmax."""
    batch, _, height, width = query.shape

    def columns(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous().view(batch * width, -1, height)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3).contiguous().view(batch * height, -1, width)

    own = torch.full((height,), float("inf"), device=query.device, dtype=query.dtype).diag().neg()
    own.masked_fill_(own != own, 0)
    column = torch.bmm(columns(query).transpose(1, 2), columns(key)) + own
    column = column.view(batch, width, height, height).permute(0, 2, 1, 3)
    row = torch.bmm(rows(query).transpose(1, 2), rows(key)).view(batch, height, width, width)
    attention = torch.cat([column, row], dim=3).softmax(dim=3)
    column = attention[..., :height].permute(0, 2, 1, 3).contiguous().view(batch * width, height, height)
    row = attention[..., height:].contiguous().view(batch * height, width, width)
    along_column = torch.bmm(columns(value), column.transpose(1, 2)).view(batch, width, -1, height)
    along_row = torch.bmm(rows(value), row.transpose(1, 2)).view(batch, height, -1, width)
    return along_column.permute(0, 2, 3, 1) + along_row.permute(0, 2, 1, 3)


def clip_tensor_formulation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The tensor formulation along three axes, for (B,C,T,H,W)."""
    axes = (2, 3, 4)  # time, column, row

    def lines(x: Tensor, axis: int) -> Tensor:  # (lines, C, N)
        return x.movedim((1, axis), (3, 4)).contiguous().flatten(0, 2)

    energies = []
    for axis in axes:
        energy = torch.bmm(lines(query, axis).transpose(1, 2), lines(key, axis))  # (lines, N, N)
        if axis != 4:
            own = torch.eye(query.shape[axis], dtype=torch.bool, device=query.device)
            energy = energy.masked_fill(own, float("-inf"))
        others = [query.shape[0], *(query.shape[other] for other in axes if other != axis)]
        energies.append(energy.unflatten(0, others).movedim(3, axis - 1))  # (B,T,H,W,N)
    attention = torch.cat(energies, dim=4).softmax(dim=4)
    results = []
    for axis, weights in zip(axes, attention.split(list(query.shape[2:]), dim=4), strict=True):
        weights = weights.movedim(axis - 1, 3).contiguous()
        result = torch.bmm(lines(value, axis), weights.flatten(0, 2).transpose(1, 2))  # (lines, C, N)
        results.append(result.unflatten(0, weights.shape[:3]).movedim((3, 4), (1, axis)))
    return results[0] + results[1] + results[2]


def einsum_formulation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same in einsum, without copies of our own making."""
    height = query.shape[2]
    own = torch.eye(height, dtype=torch.bool, device=query.device).view(1, height, 1, height)
    column = torch.einsum("bchw,bcgw->bhwg", query, key).masked_fill(own, float("-inf"))
    row = torch.einsum("bchw,bchv->bhwv", query, key)
    attention = torch.cat([column, row], dim=3).softmax(dim=3)
    along_column = torch.einsum("bcgw,bhwg->bchw", value, attention[..., :height])
    return along_column + torch.einsum("bchv,bhwv->bchw", value, attention[..., height:])


def non_local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position attends to every position; the HW×HW attention is stored."""
    attention = (query.flatten(2).transpose(1, 2) @ key.flatten(2)).softmax(dim=2)
    return (value.flatten(2) @ attention.transpose(1, 2)).view_as(value)


def non_local_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through PyTorch's memory-efficient attention, unscaled as ours.

    Its kernels want keys and values of one size and channels that lie side by side. So the values go in as
    C / Cr heads of Cr channels that share query and key, from channels-last tensors: no attention is stored,
    but the energies are computed once for each head.
    """
    batch, channels, height, width = value.shape
    reduced = query.shape[1]
    heads = channels // reduced
    q, k, v = (
        x.permute(0, 2, 3, 1).reshape(batch, height * width, -1, reduced).transpose(1, 2)
        for x in (query, key, value)
    )  # (B,1,HW,Cr), (B,1,HW,Cr), (B,heads,HW,Cr)
    q, k = q.expand(-1, heads, -1, -1), k.expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out.transpose(2, 3).reshape(value.shape)


class PyTorchPath(torch.autograd.Function):
    """What serves where no kernels are compiled."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = chunked.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return chunked.backward(grad, *ctx.saved_tensors)


FORMULATIONS: dict[str, tuple[Function, torch.memory_format]] = {
    "ours": (criss_cross_attention, torch.channels_last),
    "ours, NCHW inputs": (criss_cross_attention, torch.contiguous_format),
    "ours, PyTorch path": (PyTorchPath.apply, torch.channels_last),
    "tensor formulation": (tensor_formulation, torch.contiguous_format),
    "einsum formulation": (einsum_formulation, torch.contiguous_format),
    "non-local, explicit": (non_local, torch.contiguous_format),
    "non-local, sdpa": (non_local_sdpa, torch.channels_last),
}
CLIP_FORMULATIONS: dict[str, tuple[Function, torch.memory_format]] = {
    "ours": (criss_cross_attention, torch.channels_last_3d),
    "ours, NCTHW inputs": (criss_cross_attention, torch.contiguous_format),
    "ours, PyTorch path": (PyTorchPath.apply, torch.channels_last_3d),
    "tensor formulation": (clip_tensor_formulation, torch.contiguous_format),
}
BASELINE = "tensor formulation"


def opaque_flops(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """FLOPs of the matrix products, forward and forward + backward, where PyTorch's counter sees none.

    Both recompute the energies in the backward pass, which has two products for each of the forward ones.
    """
    batch, reduced, channels, *sizes = shape
    positions = batch * math.prod(sizes)
    if name.startswith("ours"):  # each position meets the lines through it
        met, energy, gather = positions * sum(sizes), reduced, channels
    elif name == "non-local, sdpa":  # each position meets all, once for each of C / Cr heads
        met, energy, gather = positions * math.prod(sizes), channels, channels
    else:
        return None
    forward = 2 * met * (energy + gather)
    return forward, 3 * forward + 2 * met * energy


def sizes_of(options: argparse.Namespace) -> list[int]:
    """H and W, with T before them for clips."""
    return ([options.frames] if options.frames else []) + list(options.size)


def step(function: Function, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def levels(run: Callable[[], object]) -> list[int]:
    """Bytes allocated on the CPU above what was before, after each change while ``run`` goes on.

    The last one is what the result of ``run`` keeps alive.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        kept = run()
    del kept
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return list(itertools.accumulate(size for _, size in changes)) or [0]


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """The most memory that is allocated at a time while ``run`` goes on, above what was before."""
    if device.type != "cuda":
        return max(levels(run)) / 2**20
    run()  # the first call gets workspaces that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


CALLS = 10  # of a round on CUDA
HEAD_START = 100_000_000  # clock cycles, more than 40 ms, for which a GPU waits while the host launches calls


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """What a call takes on the device: on CUDA without the host's part, as if it were always ahead."""
    if device.type != "cuda":
        return seconds(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / CALLS


def floor(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that the machine needs at least, and the rates (TFLOP/s, GB/s) they come from."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    image = a.view(1, size, size, 1).contiguous(memory_format=torch.channels_last)
    # On the CPU two libraries offer themselves, MKL and (as a convolution) oneDNN: the faster one counts.
    products = (lambda: a @ b, lambda: F.conv2d(image, b.view(size, size, 1, 1)))
    fastest = min(device_seconds(product, device) for product in products for _ in range(10))
    source = torch.empty((1 << 32 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    copy = min(device_seconds(lambda: target.copy_(source), device) for _ in range(5))
    rate, bandwidth = 2 * size**3 / fastest, 2 * 4 * source.numel() / copy

    positions = options.batch * math.prod(sizes_of(options))
    small, large = (positions * c * dtype.itemsize for c in (options.reduced, options.channels))
    shape = (options.batch, options.reduced, options.channels, *sizes_of(options))
    flops = opaque_flops("ours", shape)
    assert flops is not None
    # Forward: query, key, value in, out out; backward: these and the gradient of out in, three gradients out.
    sizes = (2 * small + 2 * large, (2 * small + 2 * large) + (4 * small + 4 * large))
    result = {"TFLOP/s": rate / 1e12, "GB/s": bandwidth / 1e9}
    for part, work, moved in zip(("forward", "both"), flops, sizes, strict=True):
        result[f"{part} ms"] = 1000 * max(work / rate, moved / bandwidth)
        result[f"{part} MB"] = moved / 1e6
        result[f"{part} memory ms"] = 1000 * moved / bandwidth
    return result


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each formulation ms, MiB and GFLOP, forward and forward + backward."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    formulations = CLIP_FORMULATIONS if options.frames else FORMULATIONS
    shapes = [
        (options.batch, c, *sizes_of(options)) for c in (options.reduced, options.reduced, options.channels)
    ]
    base = [0.3 * torch.randn(shape, device=device).to(dtype) for shape in shapes]
    base_grad = torch.randn(shapes[2], device=device).to(dtype)
    parts, results = ("forward", "both"), dict[str, dict[str, float]]()
    # Non-local after all others have been measured, with few rounds: it takes a hundred times as long, and
    # the memory that it hands back to the system makes whatever runs after it pay for getting some again.
    slow = [] if options.criss_cross_only else [name for name in formulations if name.startswith("non-local")]
    fast = [name for name in formulations if not name.startswith("non-local")]
    for group, rounds in ((fast, options.rounds), (slow, min(options.rounds, 3))):
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        for name in group:
            function, memory_format = formulations[name]
            inputs = [x.contiguous(memory_format=memory_format) for x in base]
            grad = base_grad.contiguous(memory_format=memory_format)
            runs[name, "forward"] = lambda f=function, x=inputs: f(*x)
            runs[name, "both"] = lambda f=function, x=inputs, g=grad: step(f, x, g)
            results[name] = {
                f"{part} MiB": peak_mib(runs[name, part], device) for part in ("forward", "both")
            }
            flops = opaque_flops(name, (options.batch, options.reduced, options.channels, *sizes_of(options)))
            for index, part in enumerate(parts):
                with FlopCounterMode(display=False) as counter:
                    runs[name, part]()
                results[name][f"{part} GFLOP"] = (flops[index] if flops else counter.get_total_flops()) / 1e9
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(rounds + 1):
            for key, run in runs.items():
                times[key].append(device_seconds(run, device))
        for (name, part), values in times.items():
            results[name][f"{part} ms"] = 1000 * statistics.median(values[1:])  # the first one warms up
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    heads = f"{'ms':>7} {'ratio':>7} {'MiB':>7} {'GFLOP':>7}"
    lines = [f"{'':<20} | {'forward':^31} | {'forward + backward':^31}", f"{'':<20} | {heads} | {heads}"]
    for name, row in results.items():
        cells = []
        for part in ("forward", "both"):
            ms, memory, flops = (row[f"{part} {unit}"] for unit in ("ms", "MiB", "GFLOP"))
            cells.append(f"{ms:7.1f} {results[BASELINE][f'{part} ms'] / ms:6.2f}x {memory:7.1f} {flops:7.2f}")
        lines.append(f"{name:<20} | {cells[0]} | {cells[1]}")
    return "\n".join(lines)


def hardware(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """What is measured on; an error if it is not there."""
    if options.device == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    if not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to PyTorch; use --device cpu")
    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=number(int, 1), default=1)
    parser.add_argument("--channels", type=number(int, 1), default=512)
    parser.add_argument("--reduced", type=number(int, 1), default=64, help="channels of query and key")
    parser.add_argument("--size", type=size, default=(97, 97), metavar="H,W")
    parser.add_argument(
        "--frames",
        type=number(int, 0),
        default=0,
        metavar="T",
        help="clips of T frames; 0, the default: images",
    )
    parser.add_argument("--rounds", type=number(int, 1), default=15)
    parser.add_argument("--criss-cross-only", action="store_true", help="leave the slow non-local ones out")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--tf32", action="store_true", help="on CUDA, fp32 products may round to TF32")
    options = parser.parse_args()
    if options.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    where = hardware(parser, options)
    results = measure(options)
    sizes = " ".join(f"{name}={n}" for name, n in zip("WHT", reversed(sizes_of(options)), strict=False))
    shape = f"B={options.batch} C={options.channels} Cr={options.reduced} {sizes}"
    print(f"{shape} {options.dtype}, {where}")
    print(f"torch {torch.__version__}; {backend()}\n")
    print(table(results))
    least = results["floor"] = floor(options)
    print(f"\nfloor at {least['TFLOP/s']:.2f} TFLOP/s and {least['GB/s']:.0f} GB/s, and ours over it:")
    for part, title in (("forward", "forward"), ("both", "forward + backward")):
        ms, memory_ms, moved = (least[f"{part} {unit}"] for unit in ("ms", "memory ms", "MB"))
        ours = results["ours"][f"{part} ms"]
        ratios = f"ours {ours / ms:.2f}x, {ours / memory_ms:.2f}x the memory's"
        print(f"{title:<20} {ms:7.3f} ms ({moved:.0f} MB moved: {memory_ms:.3f} ms); {ratios}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
