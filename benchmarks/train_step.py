"""A training step of the recipe, beside the same network as it is usually written: images/s and memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --batch 8

"usual" is eager fp32 with contiguous (NCHW) memory, plain BatchNorm and ReLU layers, the tensor formulation
of the attention, and SGD parameter by parameter. All have the same loss, OHEM on the device. A step is
forward, loss, backward and update. Medians of rounds in which they take turns; ratios are over "usual".
Memory is the peak above parameters and momentum. ``--compare-unfused`` measures, instead of
"usual", ours with normalisation, addition and ReLU one after another, and ratios are over each one's unfused.
``--compare-ccl`` measures ours without and with the category consistent loss.
``--processes 2`` measures steps of several processes on the CPU (gloo) that share a batch: with the settings
of DistributedDataParallel that train.py chooses, beside its defaults.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cc_attention
import libs
from benchmarks.attention import hardware, peak_mib, seconds, tensor_formulation
from benchmarks.memory import PLAIN, network, parser_of
from dataset import Batch
from networks import build_model
from networks.recomputation import recompute_in_backward
from networks.resnet import Block
from training.category_loss import CCL_CHANNELS
from training.criterion import build_criterion
from training.step import TrainStep, build_optimizer
from utils.distributed import Process

USUAL = "usual, fp32"
# name: (amp, checkpoint activations)
OURS = {
    "ours, fp32": ("off", False),
    "ours, bf16": ("bf16", False),
    "ours, bf16, activations checkpointed": ("bf16", True),
}
UNFUSED = " in parts"
WITH_CCL = " and CCL"
DEFAULTS, CHOSEN = "DDP's defaults", "train.py's DDP"
COLUMNS = ("images/s", "peak MiB")


@contextmanager
def usual_code() -> Iterator[None]:
    """The network without its savings: all activations held, attention by the tensor formulation."""

    def up_sample(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)

    with (
        patch("networks.resnet.norm_relu_conv", lambda norm, x, conv: conv(F.relu_(norm(x)))),
        patch("networks.resnet.run_block_pair", lambda first, second, x: second(first(x))),
        patch("cc_attention.modules.criss_cross_attention", tensor_formulation),
        patch("training.criterion._UpSample.apply", up_sample),
    ):
        yield


@contextmanager
def unfused_code() -> Iterator[None]:
    """Normalisation, addition and ReLU of the backbone one after another, with the same savings of memory."""

    def in_parts(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = norm(x)
        out = F.threshold(z, 0.0, 0.0) if shortcut is None else F.relu_(z + shortcut)
        return z.detach(), out

    def run_block_pair(first: Block, second: Block, x: Tensor) -> Tensor:
        branch, shortcut = first.last_norm(first.branch(x)), first.shortcut(x)
        between = branch + shortcut
        saved_branch, saved_shortcut = branch.detach(), shortcut.detach()
        with recompute_in_backward(between, lambda: F.relu_(saved_branch + saved_shortcut)):
            return second(F.relu_(between))

    with (
        patch("networks.resnet.norm_relu", in_parts),
        patch("networks.resnet.run_block_pair", run_block_pair),
    ):
        yield


def random_batch(options: argparse.Namespace, rank: int = 0) -> Batch:
    batch, size = options.batch, options.size
    images = 60 * torch.randn(batch, 3, size, size)
    labels = torch.randint(0, 19, (batch, size, size), dtype=torch.uint8)
    keys = torch.arange(batch) + rank * batch
    pinned = options.device == "cuda"
    return Batch(*(x.pin_memory() if pinned else x for x in (images, labels, keys)))


def build(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """A function that does one step of the named variant."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    process = Process((device,))
    batch_of_step = random_batch(options)
    if name == USUAL:
        criterion = build_criterion(ohem=True, ohem_keep=50000 * options.batch)
        model = network(PLAIN, options.backbone, device).to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.SGD(model.parameters(), 1e-5, 0.9, weight_decay=1e-4)
        step = TrainStep(Contiguous(model), criterion, optimizer, process)
    else:
        amp, twice = OURS[name.removesuffix(UNFUSED).removesuffix(WITH_CCL)]
        ccl = name.endswith(WITH_CCL)
        criterion = build_criterion(ohem=True, ohem_keep=50000 * options.batch, ccl=ccl)
        model = build_model(
            backbone=options.backbone,
            checkpoint_activations=twice,
            embedding_channels=CCL_CHANNELS if ccl else 0,
        )
        model.to(device, memory_format=torch.channels_last).train()
        step = TrainStep(model, criterion, build_optimizer(model, 1e-5, 0.9, 1e-4), process, amp)
    step.wrap_model()

    def run() -> None:
        unfused = unfused_code() if name.endswith(UNFUSED) else nullcontext()
        with usual_code() if name == USUAL else unfused:
            step(batch_of_step)
        step.optimizer.zero_grad()  # so that they count as this step's memory, not as there before the next

    return run


class Contiguous(nn.Module):
    """Hands its images on in contiguous memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        return self.model(images.contiguous(), keys)


def bases(options: argparse.Namespace) -> dict[str, str]:
    """The variants that are measured, each with the one that its ratios are over."""
    if options.processes > 1:
        return dict.fromkeys((DEFAULTS, CHOSEN), DEFAULTS)
    if options.compare_unfused:
        return {variant: name + UNFUSED for name in OURS for variant in (name + UNFUSED, name)}
    if options.compare_ccl:
        return {variant: name for name in OURS for variant in (name, name + WITH_CCL)}
    return dict.fromkeys((USUAL, *OURS), USUAL)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each variant images a second and the peak of memory."""
    device = torch.device(options.device)
    runs = {name: build(name, options) for name in bases(options)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = {}
    for name, run in runs.items():
        run()
        peaks[name] = peak_mib(run, device)
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {
        name: {
            "images/s": options.batch / statistics.median(times[name]),
            "peak MiB": peaks[name],
        }
        for name in runs
    }


def measure_processes(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same of processes that share a batch, each with ``options.batch`` images; memory is each one's."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_together, (options, Path(folder)), nprocs=options.processes)
        results: dict[str, dict[str, float]] = json.loads((Path(folder) / "results.json").read_text())
    return results


def train_together(rank: int, options: argparse.Namespace, folder: Path) -> None:
    """One of the processes; the first one writes its results."""
    count, device = options.processes, torch.device("cpu")
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    runs: dict[str, Callable[[], object]] = {}
    for name in bases(options):
        torch.manual_seed(0)
        model = build_model(backbone=options.backbone, norm="sync")
        model.to(memory_format=torch.channels_last).train()
        criterion = build_criterion(ohem=True, ohem_keep=50000 * options.batch)
        step = TrainStep(
            model, criterion, build_optimizer(model, 1e-5, 0.9, 1e-4), Process((device,), rank, count)
        )
        if name == DEFAULTS:
            step.model = nn.parallel.DistributedDataParallel(model)
        else:
            step.wrap_model()
        runs[name] = partial(step, random_batch(options, rank))
    results: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        run()
        results[name] = {"peak MiB": peak_mib(run, device)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            dist.barrier()
            times[name].append(seconds(run, device))
    for name in runs:
        results[name]["images/s"] = count * options.batch / statistics.median(times[name])
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # as utils.distributed.exit_process


def table(results: dict[str, dict[str, float]], base_of: dict[str, str]) -> str:
    width = max(map(len, results))
    lines = [" " * width + "".join(f" | {column:>9} {'ratio':>6}" for column in COLUMNS)]
    for name, row in results.items():
        base = results[base_of[name]]
        cells = [f" | {row[c]:9.3g} {row[c] / base[c]:5.2f}x" for c in COLUMNS]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare-unfused", action="store_true", help="what one pass for each ReLU saves")
    what.add_argument("--compare-ccl", action="store_true", help="what the category consistent loss costs")
    what.add_argument("--processes", type=int, default=1, help="that share a batch, on the CPU")
    options = parser.parse_args()
    if options.processes > 1 and options.device != "cpu":
        parser.error("--processes goes with --device cpu")
    where = hardware(parser, options)
    results = measure_processes(options) if options.processes > 1 else measure(options)
    print(f"{options.backbone}, {options.batch}×3×{options.size}×{options.size}, {where}")
    print(f"torch {torch.__version__}; attention: {cc_attention.backend()}; ABN: {libs.backend()}\n")
    print(table(results, bases(options)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
