"""Train a segmentation network. Without options: the published recipe on Cityscapes, R=2 with OHEM."""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cc_attention
import libs
from dataset import (
    DATASETS,
    DataError,
    Source,
    StepSampler,
    TrainDataset,
    TrainTransform,
    denormalize,
    find_source,
    fingerprint,
    load,
    pairs_of,
)
from networks import BACKBONES, CLASSIFIERS, HEADS, IMAGENET_CLASSIFIER, MODELS, NORMS, build_model
from utils.arguments import (
    SWITCH,
    Parser,
    add_data_arguments,
    check_data_arguments,
    count,
    exit_on,
    number,
    positive_int,
    size,
)
from utils.checkpoint import (
    CheckpointError,
    check_room,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    model_state,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    step_of,
)
from utils.criterion import build_criterion
from utils.distributed import DeviceError, Process, process_group, world_size
from utils.logger import Logger, side_by_side
from utils.schedule import poly

LOG_EVERY = 10  # steps; reading a loss waits for the device, so it is not done at every step
PICTURES = 10  # how often in a run predictions are shown in TensorBoard

# Settings that change a run's numbers: resuming with another value is not the same run any more.
DEFINING = (
    "batch_size", "input_size", "learning_rate", "momentum", "weight_decay",
    "power", "num_steps", "ignore_label", "random_mirror", "random_scale", "random_seed", "model", "backbone",
    "recurrence", "norm", "ohem", "ohem_thres", "ohem_keep", "freeze_bn",
)  # fmt: skip


class TrainingError(RuntimeError):
    """Training that cannot go on: one line that says where it stopped and why."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    rate = number(float, 0, exclusive=True)
    share = number(float, 0, 1)

    data = add_data_arguments(parser, DATASETS, split="train")
    data.add_argument("--input-size", type=size, default="769,769", metavar="H,W", help="crop in pixels")
    data.add_argument("--random-scale", **SWITCH, default=True, help="scale by 0.7, 0.8 … 2.1")
    data.add_argument("--random-mirror", **SWITCH, default=True, help="mirror left and right")

    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=MODELS, default="ccnet", help="the network")
    network.add_argument("--backbone", choices=BACKBONES, default="resnet101", help="its feature extractor")
    network.add_argument("--recurrence", type=count, default=2, help="rounds R of criss-cross attention")
    network.add_argument(
        "--norm", choices=NORMS, default="inplace_abn", help="normalisation; sync: over GPUs"
    )
    network.add_argument("--restore-from", type=Path, help="checkpoint, or ImageNet backbone, to start from")
    network.add_argument("--not-restore-last", **SWITCH, default=False, help="except its classifiers")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--ohem", **SWITCH, default=True, help="learn from hard pixels only")
    loss.add_argument("--ohem-thres", type=share, default=0.7, help="probability up to which one is hard")
    loss.add_argument("--ohem-keep", type=count, default=100000, help="pixels kept at least, on each GPU")

    recipe = parser.add_argument_group("schedule")
    recipe.add_argument("--batch-size", type=positive_int, default=8, help="images a step, over all GPUs")
    recipe.add_argument("--num-steps", type=positive_int, default=60000, help="length of the run")
    recipe.add_argument("--start-iters", type=count, default=0, help="step to start at, for the schedule")
    recipe.add_argument("--learning-rate", type=rate, default=1e-2, help="at step 0; falls polynomially to 0")
    recipe.add_argument("--power", type=number(float, 0), default=0.9, help="of the polynomial")
    recipe.add_argument("--momentum", type=share, default=0.9, help="of SGD")
    recipe.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of SGD")
    recipe.add_argument(
        "--freeze-bn",
        "--ft",
        **SWITCH,
        default=False,
        help="fine-tune: statistics, weights and biases of the normalisation stay as they are",
    )
    recipe.add_argument(
        "--random-seed",
        type=number(int, 0, 2**32 - 1),
        default=12345,
        help="of weights, order, crops, dropout",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--gpu", default="auto", help="auto, cpu, or a GPU's number; several GPUs: torchrun")
    run.add_argument("--snapshot-dir", type=Path, default="snapshots", help="for checkpoints and logs")
    run.add_argument("--save-pred-every", type=positive_int, default=5000, help="steps between checkpoints")
    run.add_argument("--save-num-images", type=count, default=2, help="images a time in TensorBoard")
    run.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="continue the run in --snapshot-dir exactly, from its newest checkpoint or the one given",
    )  # fmt: skip

    args = parser.parse_args(argv)
    check_data_arguments(parser, args)
    if args.start_iters >= args.num_steps:
        parser.error(f"--start-iters {args.start_iters} is not below --num-steps {args.num_steps}")
    if args.batch_size % world_size():
        parser.error(f"--batch-size {args.batch_size} cannot be split over {world_size()} processes")
    height, width = args.input_size
    if args.batch_size // world_size() * -(-height // 8) * -(-width // 8) < 2:
        parser.error("one feature a batch has no variance: raise --input-size or --batch-size")
    return args


@dataclass
class Run:
    """What the parts of a training run share."""

    args: argparse.Namespace
    source: Source
    dataset: TrainDataset
    network: nn.Module
    optimizer: torch.optim.Optimizer
    process: Process


def main(args: argparse.Namespace) -> None:
    with process_group(args.gpu) as process:
        run = build(args, process)
        first_step = restore(run)
        prepare_snapshots(run, first_step)
        if process.is_main:
            print_summary(run)
        if first_step < args.num_steps:
            train(run, first_step)
        elif process.is_main:
            print(f"the run is complete: all {args.num_steps} steps are done")


def build(args: argparse.Namespace, process: Process) -> Run:
    """Data, network and optimiser of a command line."""
    source = find_source(args.data_dir, args.dataset, args.num_classes, args.ignore_label)
    pairs = pairs_of(source, args.data_dir, args.split, args.data_list)
    args.dataset, args.num_classes = source.name, source.table.num_classes
    args.images = fingerprint(pairs, args.data_dir)
    transform = TrainTransform(args.input_size, args.random_scale, args.random_mirror, args.ignore_label)
    dataset = TrainDataset(pairs, source.table, transform, args.random_seed)

    torch.backends.cudnn.benchmark = True  # crops have one size, so the search for the fastest kernel pays
    torch.manual_seed(args.random_seed)
    network = build_model(args.model, args.num_classes, args.backbone, args.recurrence, args.norm)
    network.to(process.device, memory_format=torch.channels_last)
    if args.freeze_bn:
        libs.freeze(network)
    optimizer = torch.optim.SGD(
        network.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
    )
    torch.manual_seed(args.random_seed + process.rank)  # dropout differs between processes
    return Run(args, source, dataset, network, optimizer, process)


def restore(run: Run) -> int:
    """Load what ``--resume`` or ``--restore-from`` name; the step to go on with."""
    args = run.args
    if args.resume is not None:
        prefix = run.source.prefix
        path = Path(args.resume) if args.resume else newest_checkpoint(args.snapshot_dir, prefix)
        if path is not None:
            return resume(run, find_checkpoint(path))
        if run.process.is_main:
            print(f"--resume: no {prefix}_*.pth in {args.snapshot_dir} yet, starting anew")
    if args.restore_from is not None:
        path = find_checkpoint(args.restore_from)
        state = model_state(load_checkpoint(path))
        is_backbone = not any(name.startswith(HEADS) for name in state)
        may_lack, skip = (HEADS, IMAGENET_CLASSIFIER) if is_backbone else ((), ())
        if args.not_restore_last:
            may_lack, skip = (*may_lack, *CLASSIFIERS), (*skip, *CLASSIFIERS)
        load_weights(run.network, state, path, may_lack, skip)
    return args.start_iters


def resume(run: Run, path: Path) -> int:
    """Restore a run's whole state from one of its checkpoints; the step to go on with."""
    checkpoint = load_checkpoint(path)
    missing = {"model", "optimizer", "step", "random_states", "settings"} - checkpoint.keys()
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed, it lacks {', '.join(sorted(missing))}")
    load_weights(run.network, model_state(checkpoint), path)
    process = run.process
    try:
        step, then = int(checkpoint["step"]), dict(checkpoint["settings"])
        states = checkpoint["random_states"]
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if len(states) == process.world_size:
            set_random_state(states[process.rank], process.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be resumed, its contents are damaged ({reason})") from None
    for group in run.optimizer.param_groups:  # the rate is set at each step
        group["momentum"], group["weight_decay"] = run.args.momentum, run.args.weight_decay

    now = settings_of(run.args)
    if then.get("images") != now["images"]:
        raise CheckpointError(
            f"{path}: was trained on other data ({then.get('images')}, not {now['images']})"
        )
    changed = [f"{name} {then.get(name)} → {now[name]}" for name in DEFINING if then.get(name) != now[name]]
    if len(states) != process.world_size:
        changed.append(f"processes {len(states)} → {process.world_size}")
    if process.is_main:
        print(f"resuming {path} at step {step}")
        if changed:
            print(f"not the same run any more, since these settings changed: {', '.join(changed)}")
    return step


def prepare_snapshots(run: Run, first_step: int) -> None:
    """Find out before training whether its checkpoints will have a place.

    One process looks, all stop if it finds a fault, and only that one speaks.
    """
    fault = None
    if run.process.is_main:
        try:
            check_snapshots(run, first_step)
        except CheckpointError as error:
            fault = error
    if run.process.gather(fault)[0] is not None:
        if fault is None:
            sys.exit(1)
        raise fault


def check_snapshots(run: Run, first_step: int) -> None:
    """No other run's checkpoints where this one writes, and room for its own."""
    args = run.args
    newest = newest_checkpoint(args.snapshot_dir)
    if newest and args.resume is None:
        raise CheckpointError(
            f"{args.snapshot_dir} holds {newest.name} of an earlier run; "
            "continue it with --resume or choose another --snapshot-dir"
        )
    if newest and step_of(newest) > first_step:
        raise CheckpointError(
            f"{args.snapshot_dir} holds {newest.name}, which is later than step {first_step}; "
            "resume that one, move it away, or choose another --snapshot-dir"
        )
    # Weights and statistics, momentum, and a tenth for the rest.
    entries = [*run.network.state_dict().values(), *run.network.parameters()]
    checkpoint_bytes = int(1.1 * sum(x.numel() * x.element_size() for x in entries)) + 2**16
    to_come = -(-(args.num_steps - first_step) // args.save_pred_every)
    check_room(args.snapshot_dir, checkpoint_bytes, to_come)


def print_summary(run: Run) -> None:
    args, process = run.args, run.process
    images, crops = len(run.dataset.pairs), "{}x{}".format(*args.input_size)
    parameters = sum(x.numel() for x in run.network.parameters()) / 1e6
    print(f"data      {args.dataset}, {images} images, {args.num_classes} classes, crops of {crops}")
    print(f"network   {args.model} on {args.backbone}, R={args.recurrence}, {parameters:.2f} M parameters")
    print(f"device    {process.device}, {process.world_size} process(es)")
    print(f"attention {cc_attention.backend()}")
    print(f"norm      {args.norm}; {libs.backend()}")
    print(f"writes    {args.snapshot_dir}/ (checkpoints, log.jsonl, TensorBoard events)")
    if args.restore_from is None and args.resume is None:
        print("note      no --restore-from: the backbone starts from random weights, not from ImageNet")


def train(run: Run, first_step: int) -> None:
    """The loop over the steps that are left."""
    args, process = run.args, run.process
    criterion = build_criterion(args.ohem, args.ohem_thres, args.ohem_keep, ignore_index=args.ignore_label)
    sampler = StepSampler(args.batch_size, first_step, args.num_steps, process.rank, process.world_size)
    batches = load(run.dataset, args.num_workers, sampler, pin_memory=process.device.type == "cuda")
    model = training_mode(run)
    losses: list[torch.Tensor] = []
    since = time.perf_counter()
    with (
        Logger(args.snapshot_dir, first_step) if process.is_main else nullcontext() as logger,
        tqdm(
            total=args.num_steps, initial=first_step, disable=logger is None, unit="step", mininterval=1
        ) as progress,
    ):
        for step, (images, labels) in enumerate(batches, start=first_step + 1):
            rate = poly(args.learning_rate, step - 1, args.num_steps, args.power)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            images = images.to(process.device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(process.device, non_blocking=True)
            outputs = model(images)
            loss = criterion(outputs, labels)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            losses.append(loss.detach())
            progress.update()

            save_now = step % args.save_pred_every == 0 or step == args.num_steps
            if save_now or step % LOG_EVERY == 0:
                mean_loss = finite(process.mean(torch.stack(losses).mean()).item(), step)
                if logger:
                    speed = len(losses) * args.batch_size / (time.perf_counter() - since)
                    progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{rate:.2e}")
                    logger.scalars(
                        step, {"loss": mean_loss, "learning_rate": rate, "images_per_second": speed}
                    )
                losses, since = [], time.perf_counter()
            if logger and step % max(args.num_steps // PICTURES, 1) == 0:
                show(run, logger, step, images, labels, outputs["out"])
            if save_now and (path := save(run, step)):
                progress.write(f"saved {path}")


def training_mode(run: Run) -> nn.Module:
    """The network as it is trained, under torchrun as one of several."""
    run.network.train()
    if run.process.world_size == 1:
        return run.network
    # Without a round of attention its layer has parameters that get no gradient.
    return DistributedDataParallel(run.network, find_unused_parameters=run.args.recurrence == 0)


def finite(loss: float, step: int) -> float:
    """The loss, if training can go on from it."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss}; earlier checkpoints are kept, a lower --learning-rate may help"
        )
    return loss


def save(run: Run, step: int) -> Path | None:
    """Write the checkpoint of a step; its path in the process that wrote it."""
    random_states = run.process.gather(random_state(run.process.device))
    if not run.process.is_main:
        return None
    contents = {
        "model": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": step,
        "random_states": random_states,
        "settings": settings_of(run.args),
    }
    return save_checkpoint(contents, run.args.snapshot_dir, run.source.prefix, step)


def show(
    run: Run, logger: Logger, step: int, images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor
) -> None:
    """The first images of the batch, their labels and the predictions, side by side, in TensorBoard."""
    table = run.source.table
    logits = logits[: run.args.save_num_images].detach().float()
    logits = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    for index, prediction in enumerate(logits.argmax(dim=1).cpu().numpy()):
        panel = side_by_side(
            denormalize(images[index].cpu().numpy()),
            table.colour(labels[index].cpu().numpy()),
            table.colour(prediction),
        )
        logger.picture(step, f"image, label, prediction/{index}", panel)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as plain values that a checkpoint can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


if __name__ == "__main__":
    exit_on(
        lambda: main(parse_args()),
        usage=(DeviceError,),
        data=(DataError, CheckpointError, TrainingError, OSError, MemoryError),
    )
