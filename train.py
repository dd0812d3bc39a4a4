"""Train a segmentation network. Without options: the published recipe on Cityscapes, R=2 with OHEM."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import cc_attention
import libs
from dataset import (
    DATASETS,
    DataError,
    EvaluationDataset,
    Pair,
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
from networks import (
    BACKBONES,
    CLASSIFIERS,
    HEADS,
    IMAGENET_CLASSIFIER,
    MODELS,
    NORMS,
    build_model,
    fold_norms,
)
from utils.arguments import (
    SWITCH,
    Parser,
    add_data_arguments,
    add_training_arguments,
    check_data_arguments,
    check_training_arguments,
    count,
    exit_on,
    size,
)
from utils.checkpoint import CheckpointError, load_checkpoint, load_weights, model_state
from utils.criterion import Losses, build_criterion
from utils.distributed import (
    DeviceError,
    PeerError,
    Process,
    choose_devices,
    is_out_of_memory,
    process_group,
)
from utils.evaluation import evaluate
from utils.inference import sliding
from utils.interruption import Interruption
from utils.logger import Logger, duration, side_by_side, was_logged
from utils.metrics import ConfusionMatrix
from utils.provenance import describe, record
from utils.resumption import check_same_start, resume, state_of
from utils.schedule import poly
from utils.snapshots import Snapshots, find_checkpoint
from utils.training import (
    PRECISIONS,
    LossWindow,
    TrainingError,
    TrainStep,
    build_optimizer,
    make_deterministic,
    peak_memory_mib,
)

LOG_EVERY = 10  # steps; reading a loss waits for the device, so it is not done at every step
PICTURES = 10  # how often in a run predictions are shown in TensorBoard
FAILED = 100  # beyond the signals' numbers

# Settings that change a run's numbers: resuming with another value is not the same run any more.
DEFINING = (
    "batch_size", "input_size", "learning_rate", "momentum", "weight_decay", "power", "num_steps",
    "ignore_label", "random_mirror", "random_scale", "random_seed", "model", "backbone", "recurrence", "norm",
    "ohem", "ohem_thres", "ohem_keep", "freeze_bn", "amp", "accumulate",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = add_data_arguments(parser, DATASETS, split="train")
    data.add_argument("--input-size", type=size, default="769,769", metavar="H,W", help="crop in pixels")
    data.add_argument("--random-scale", **SWITCH, default=True, help="scale by 0.7, 0.8 … 2.1")
    data.add_argument("--random-mirror", **SWITCH, default=True, help="mirror left and right")

    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=MODELS, default="ccnet", help="the network")
    network.add_argument("--backbone", choices=BACKBONES, default="resnet101", help="its feature extractor")
    network.add_argument("--recurrence", type=count, default=2, help="rounds R of criss-cross attention")
    network.add_argument(
        "--norm", choices=("auto", *NORMS), default="auto",
        help="normalisation; auto: inplace_abn, on several GPUs its synchronised form, sync",
    )  # fmt: skip
    network.add_argument("--restore-from", type=Path, help="checkpoint, or ImageNet backbone, to start from")
    network.add_argument("--not-restore-last", **SWITCH, default=False, help="except its classifiers")
    add_training_arguments(parser, tuple(PRECISIONS))

    args = parser.parse_args(argv)
    check_data_arguments(parser, args)
    check_training_arguments(parser, args)
    return args


@dataclass
class Run:
    """What the parts of a training run share."""

    args: argparse.Namespace
    process: Process
    source: Source
    dataset: TrainDataset
    validation: list[Pair]
    step: TrainStep
    snapshots: Snapshots
    interruption: Interruption = field(default_factory=Interruption)
    best_miou: float = -1.0

    @property
    def network(self) -> nn.Module:
        return self.step.network

    @property
    def optimizer(self) -> torch.optim.SGD:
        return self.step.optimizer


def main(args: argparse.Namespace) -> None:
    if args.deterministic:
        make_deterministic()
    with process_group(choose_devices(args.gpu)) as process:
        with process.together():
            run = build(args, process)
            first_step = restore(run)
        check_same_start(process, args.images, first_step)
        with ExitStack() as stack:
            with process.together():
                if process.is_main:
                    stack.enter_context(run.snapshots.locked())
                    prepare(run, first_step)
            train(run, first_step)
    if run.interruption.signum:
        sys.exit(128 + run.interruption.signum)


def build(args: argparse.Namespace, process: Process) -> Run:
    """Data, network and optimiser of a command line."""
    source = find_source(args.data_dir, args.dataset, args.num_classes, args.ignore_label)
    pairs = pairs_of(source, args.data_dir, args.split, args.data_list)
    validation = validation_pairs(source, args) if args.val_every else []
    args.dataset, args.num_classes = source.name, source.table.num_classes
    args.images = fingerprint(pairs, args.data_dir)
    args.val_images = fingerprint(validation, args.data_dir)
    transform = TrainTransform(args.input_size, args.random_scale, args.random_mirror, args.ignore_label)
    dataset = TrainDataset(pairs, source.table, transform, args.random_seed)

    # Crops have one size, so the search for the fastest kernel pays; it may end otherwise in another run.
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.random_seed)
    norm = args.norm
    if norm == "auto":
        norm = "sync" if process.parts > 1 else "inplace_abn"
    network = build_model(
        args.model, args.num_classes, args.backbone, args.recurrence, norm, args.checkpoint_activations
    )
    network.to(process.device, memory_format=torch.channels_last).train()
    if args.freeze_bn:
        libs.freeze(network)
    optimizer = build_optimizer(network, args.learning_rate, args.momentum, args.weight_decay)
    images_together = args.batch_size // args.accumulate
    criterion = build_criterion(
        args.ohem, args.ohem_thres, args.ohem_keep * images_together // 2, ignore_index=args.ignore_label
    )
    step = TrainStep(network, criterion, optimizer, process, args.amp, args.accumulate, libs.abort)
    torch.manual_seed(args.random_seed + process.rank)  # whatever layers draw that do not go by keys
    snapshots = Snapshots(args.snapshot_dir, source.prefix, args.keep_last)
    return Run(args, process, source, dataset, validation, step, snapshots)


def validation_pairs(source: Source, args: argparse.Namespace) -> list[Pair]:
    """What ``--val-every`` evaluates."""
    if args.val_list is None and args.val_split not in source.splits:
        splits = ", ".join(source.splits) or "no splits of its own"
        raise DataError(f"--val-split {args.val_split}: {source.name} has {splits}; give --val-list")
    pairs = pairs_of(source, args.data_dir, args.val_split, args.val_list)
    if any(pair.label is None for pair in pairs):
        where = args.val_list or f"--val-split {args.val_split}"
        raise DataError(f"{where}: has images without labels, which --val-every cannot score")
    return pairs


def restore(run: Run) -> int:
    """Load what ``--resume`` or ``--restore-from`` name; the step to go on with."""
    args = run.args
    if args.resume is not None:
        path = Path(args.resume) if args.resume else run.snapshots.newest()
        if path is not None:
            path, settings = find_checkpoint(path), settings_of(args)
            return resume(path, run.step, settings, DEFINING)
        if run.process.is_main:
            print(f"--resume: no {run.source.prefix}_*.pth in {args.snapshot_dir} yet, starting anew")
    if args.restore_from is not None:
        path = find_checkpoint(args.restore_from)
        state = model_state(load_checkpoint(path))
        is_backbone = not any(name.startswith(HEADS) for name in state)
        may_lack, skip = (HEADS, IMAGENET_CLASSIFIER) if is_backbone else ((), ())
        if args.not_restore_last:
            may_lack, skip = (*may_lack, *CLASSIFIERS), (*skip, *CLASSIFIERS)
        try:
            load_weights(run.network, state, path, may_lack, skip)
        except CheckpointError as error:
            own = run.network.state_dict()
            other = [name for name in state if name in own and state[name].shape != own[name].shape]
            if args.not_restore_last or not other or not all(name.startswith(CLASSIFIERS) for name in other):
                raise
            raise CheckpointError(f"{error}; --not-restore-last leaves the classifiers out") from None
        if run.process.is_main:
            new = "heads" if is_backbone else "classifiers" if args.not_restore_last else ""
            print(f"starting from {path}" + f", with new {new} for {args.num_classes} classes" * bool(new))
    return args.start_iters


def prepare(run: Run, first_step: int) -> None:
    """What is to be known and written before training."""
    args = run.args
    # Weights and statistics, momentum, and a tenth for the rest.
    entries = [*run.network.state_dict().values(), *run.network.parameters()]
    checkpoint_bytes = int(1.1 * sum(x.numel() * x.element_size() for x in entries)) + 2**16
    steps = max(args.num_steps - first_step, 0)
    run.snapshots.prepare(
        first_step,
        args.resume is not None,
        checkpoint_bytes,
        to_come=-(-steps // args.save_pred_every),
        best=steps > 0 and args.val_every > 0,
    )
    print_summary(run, first_step)
    if steps:
        start = describe(settings_of(args)) | {"first_step": first_step, "processes": run.process.world_size}
        record(args.snapshot_dir / "run.json", start, continues=first_step > args.start_iters)


def print_summary(run: Run, first_step: int) -> None:
    args, process = run.args, run.process
    height, width = args.input_size
    parameters = sum(x.numel() for x in run.network.parameters()) / 1e6
    names = [torch.cuda.get_device_name(x) if x.type == "cuda" else "CPU" for x in process.devices]
    where = f"{', '.join(names)} in each of {process.world_size} processes"
    if process.world_size == 1:
        where = ", ".join(names)
    epochs = args.num_steps * args.batch_size / len(run.dataset.pairs)
    precision = {"off": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast, scaled loss"}[args.amp]
    extras = {"compiled": args.compile, "activations computed twice": args.checkpoint_activations}
    extras |= {f"batches in {args.accumulate} parts": args.accumulate > 1, "repeatable": args.deterministic}
    how = ", ".join([precision, *(name for name, on in extras.items() if on)])
    norm = next(type(layer).__name__ for layer in run.network.modules() if isinstance(layer, libs.ABN))
    print(
        f"data      {args.dataset}, {len(run.dataset.pairs)} images, {args.num_classes} classes, "
        f"crops of {height}x{width}, {args.num_workers} workers a process\n"
        f"network   {args.model} on {args.backbone}, R={args.recurrence}, {parameters:.2f} M parameters\n"
        f"device    {where}; {how}\n"
        f"attention {cc_attention.backend()}\n"
        f"norm      {norm}; {libs.backend()}\n"
        f"steps     {first_step} → {args.num_steps} of {args.batch_size} images, {epochs:.4g} epochs in all\n"
        f"writes    {args.snapshot_dir}/ (checkpoints, run.json, log.jsonl, TensorBoard events)"
    )
    if args.restore_from is None and first_step == args.start_iters:
        print("note      no --restore-from: the backbone starts from random weights, not from ImageNet")


def train(run: Run, first_step: int) -> None:
    """The loop over the steps that are left, or until a signal comes."""
    args, process = run.args, run.process
    # A kill may have come between a checkpoint and its evaluation.
    missed = is_due(args.val_every, first_step) and not was_logged(args.snapshot_dir, first_step, "mIoU")
    missed = process.gather(missed)[0]
    if first_step >= args.num_steps and not missed:
        if process.is_main:
            print(f"the run is complete: {first_step} steps are done, --num-steps is {args.num_steps}")
        return
    if args.val_every:
        best = run.snapshots.best_miou(args.val_images) if process.is_main else None
        run.best_miou = process.gather(best)[0]
    sampler = StepSampler(
        args.batch_size, first_step, args.num_steps, process.rank, process.world_size, args.accumulate
    )
    batches = load(run.dataset, args.num_workers, sampler, pin_memory=process.device.type == "cuda")
    run.step.start(args.compile)
    window = LossWindow(process, args.batch_size)
    done = saved = logged = first_step
    with (
        run.interruption,
        Logger(args.snapshot_dir, first_step) if process.is_main else nullcontext() as logger,
        tqdm(
            total=args.num_steps, initial=first_step, disable=logger is None, unit="step", mininterval=1
        ) as progress,
    ):
        if missed:
            validate(run, first_step, logger)
        for step in range(first_step + 1, args.num_steps + 1):
            window.begin()
            batch = next_batch(run, batches)
            if batch is None:
                break
            rate = poly(args.learning_rate, step - 1, args.num_steps, args.power)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            losses, logits = take(run, step, *batch, run.dataset.keys(sampler.positions(step - 1)))
            window.end(losses)
            progress.update()
            done = step

            save_now = is_due(args.save_pred_every, step) or step == args.num_steps
            if save_now or is_due(LOG_EVERY, step):
                log(run, step, window.read(step), logger, progress)
                logged = step
            if logger and is_due(max(args.num_steps // PICTURES, 1), step):
                show(run, step, *batch, logits, logger)
            if save_now:
                save(run, step)
                saved = step
            if is_due(args.val_every, step):
                validate(run, step, logger)
        if done > saved:  # a signal came
            if done > logged:
                log(run, done, window.read(done), logger, progress)
            save(run, done)
        elif done == args.num_steps and process.is_main:
            run.snapshots.prune()
    if run.interruption.signum and process.is_main:
        print(f"stopped after step {done}; --resume continues from there", file=sys.stderr)


def is_due(every: int, step: int) -> bool:
    """Whether something is to be done after this step; never if ``every`` is 0."""
    return every > 0 and step > 0 and step % every == 0


def next_batch(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """This process's next images and labels; None if a signal came to any process."""
    batch, fault = None, None
    if not run.interruption.signum:
        try:
            batch = next(batches)
        except (DataError, OSError, MemoryError) as error:
            if not run.interruption.signum:  # which may have ended a worker
                fault = error
    state = run.process.largest(run.interruption.signum if fault is None else FAILED)
    if state == FAILED:
        run.process.all_well(fault)
    if state:  # not else: a signal may have come since
        run.interruption.signum = state
    return None if state else batch


def take(run: Run, step: int, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Losses, Tensor]:
    """One step, whose want of memory is told in a line."""
    try:
        return run.step(images, labels, keys)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {step}: out of memory; lower --batch-size or --input-size, or try --accumulate 2, "
            "--checkpoint-activations or --amp bf16"
        ) from None


def log(run: Run, step: int, values: dict[str, Any], logger: Logger | None, progress: tqdm) -> None:
    """Numbers of the last steps: into the files, and on the progress bar."""
    if logger is None:
        return
    if not progress.postfix:
        seconds = (run.args.num_steps - step) * run.args.batch_size / values["images_per_second"]
        tqdm.write(
            f"time      about {duration(seconds)} to come, at {values['images_per_second']:.3g} images/s"
        )
    run.snapshots.prune()  # losses are sound, so are the weights they come from
    norm = run.step.gradient_norm().item()
    values |= {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "gradient_norm": norm if math.isfinite(norm) else None,
        "memory_mib": peak_memory_mib(run.process.devices),
    }
    logger.scalars(step, values)
    progress.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2e}")


def save(run: Run, step: int) -> None:
    """Write the checkpoint of a step."""
    checkpoint = state_of(run.step, step, settings_of(run.args))
    with run.process.together():
        if run.process.is_main:
            tqdm.write(f"saved {run.snapshots.save(checkpoint, step)}")


def validate(run: Run, step: int, logger: Logger | None) -> None:
    """Evaluate as evaluate.py does by default; a checkpoint better than all before is kept."""
    args, process = run.args, run.process
    process.share(run.network.buffers())  # of layers that are not synchronised
    predict = sliding(fold_norms(run.network), args.input_size)
    mine = run.validation[process.rank :: process.world_size]
    matrix = ConfusionMatrix(args.num_classes, args.ignore_label, process.device)
    samples = load(
        EvaluationDataset(mine, run.source.table, args.ignore_label),
        args.num_workers,
        pin_memory=process.device.type == "cuda",
    )
    with process.together():
        evaluate(predict, run.interruption.until(samples, DataError), matrix, process.device)
    if process.largest(run.interruption.signum):
        return  # it is made up for when the run goes on
    matrix.counts = process.sum(matrix.counts)
    miou = matrix.mean_iou()
    if math.isnan(miou):  # in all processes alike
        fault = DataError("no labelled pixel in the images of --val-every, so there are no scores")
        process.all_well(fault)
    scores = matrix.summary(run.source.table.names)
    del scores["confusion_matrix"]
    is_best = miou > run.best_miou
    if is_best:
        checkpoint = state_of(run.step, step, settings_of(args))
        checkpoint["validation"] = {"step": step, "images": args.val_images, **scores}
        with process.together():
            if process.is_main:
                run.snapshots.save_best(checkpoint)
    if logger:  # now, so that a kill before leaves the evaluation to be made up for
        logger.scalars(step, scores, group="val")
        best = "the best so far" if is_best else f"best {100 * run.best_miou:.2f}"
        tqdm.write(f"step {step}: mIoU {100 * miou:.2f} over {len(run.validation)} images, {best}")
    run.best_miou = max(miou, run.best_miou)


def show(run: Run, step: int, images: Tensor, labels: Tensor, logits: Tensor, logger: Logger) -> None:
    """The first images of the batch, their labels and the predictions, side by side, in TensorBoard."""
    table = run.source.table
    logits = logits[: run.args.save_num_images].float()
    logits = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    for index, prediction in enumerate(logits.argmax(dim=1).cpu().numpy()):
        panel = side_by_side(
            denormalize(images[index].numpy()),
            table.colour(labels[index].numpy()),
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
        data=(DataError, CheckpointError, TrainingError, PeerError, OSError, MemoryError),
    )
