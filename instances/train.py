"""Train Mask R-CNN with criss-cross attention on COCO. Without options: the published setting."""

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import cc_attention
from instances.coco import CocoSplit, StepBatches, TrainDataset, read_by_workers, read_split
from instances.errors import InstancesError, UsageError, require
from instances.model import build_model, norm_eps_of, start_from
from instances.options import PRECISIONS, config_of, parse_args
from utils.arguments import run_script
from utils.checkpoint import CheckpointError, load_checkpoint, not_finite, save_checkpoint
from utils.distributed import Process, process_group

# Settings that change a run's numbers: resuming with another value would not be the same run.
DEFINING = (
    "batch_size", "num_steps", "learning_rate", "momentum", "weight_decay", "warm_up", "mirror", "seed",
    "amp",
)  # fmt: skip


class TrainingError(InstancesError):
    """A run that cannot go on."""


def learning_rate(base: float, step: int, num_steps: int, warm_up: int) -> float:
    """Linear warm-up over the first steps, then a tenth after 2/3 of the steps and again after 8/9.

    Args:
        step: steps that were done before this one.
    """
    rate = base
    for part in (2 / 3, 8 / 9):  # 60 000 and 80 000 of 90 000
        if step >= round(num_steps * part):
            rate /= 10
    return rate * min(1.0, (step + 1) / (warm_up + 1))


def fetch_weights(args: argparse.Namespace) -> Path | None:
    """The file to start from, downloaded by torchvision where ``--weights`` names its weights."""
    if args.weights == "none":
        return None
    if args.weights not in ("imagenet", "coco"):
        return Path(args.weights)
    models = require("torchvision.models")
    name = f"ResNet{args.backbone.removeprefix('resnet')}_Weights"
    if args.weights == "imagenet":
        url = getattr(models, name).IMAGENET1K_V1.url
    elif args.backbone == "resnet50":
        url = models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    else:
        raise UsageError(f"--weights coco: torchvision has them for resnet50, not for {args.backbone}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise TrainingError(
                f"--weights {args.weights}: cannot download {url} ({error}); download it elsewhere and give "
                "the file, or start from random weights with --weights none"
            ) from None
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("instances_*.pth") if path.stem.split("_")[-1].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.split("_")[-1]))


class Run:
    """One training run: network, optimiser, and what they were made from."""

    def __init__(self, args: argparse.Namespace, data: CocoSplit, process: Process) -> None:
        self.args, self.data, self.process = args, data, process
        found = checkpoints(args.snapshot_dir) if args.resume else []
        self.resumed = found[-1] if found else None
        weights = fetch_weights(args) if self.resumed is None and process.is_main else None
        self.weights: Path | None = process.all_gather_object(weights)[0]
        self.config = config_of(args, data.num_classes, norm_eps_of(self.resumed or self.weights))
        torch.manual_seed(args.seed)
        self.model = build_model(self.config).to(process.device)
        # On the CPU channels-last steps of this network take a third longer.
        if process.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        parameters = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = torch.optim.SGD(
            parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay
        )
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
        self.step = 0
        self.origin = "random weights"

    def restore(self) -> None:
        """Go on from the newest checkpoint with ``--resume``, else load the weights to start from."""
        if self.resumed is not None:
            self._resume(self.resumed)
            self.origin = f"{self.resumed}, step {self.step}"
        elif self.weights is not None:
            self.origin = start_from(self.model, self.weights, self.args.not_restore_last)

    def _resume(self, path: Path) -> None:
        contents = load_checkpoint(path)
        if "config" not in contents or "settings" not in contents:
            raise CheckpointError(f"{path}: is not a checkpoint of instances.train")
        now = self.config.to_dict() | {name: getattr(self.args, name) for name in DEFINING}
        now["images"] = self.data_key()
        before = contents["config"] | contents["settings"]
        for name, value in now.items():
            if before.get(name) != value:
                raise CheckpointError(
                    f"{path}: was trained with {name} {before.get(name)}, now it is {value}; an exact resume "
                    "needs the same (--weights starts a new run from a checkpoint)"
                )
        self.model.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.scaler.load_state_dict(contents["scaler"])
        self.step = contents["step"]

    def data_key(self) -> list[int]:
        """Numbers that another data set is unlikely to share: images, objects, the sum of the images' ids."""
        objects = sum(len(entries) for entries in self.data.annotations)
        return [len(self.data.images), objects, sum(image["id"] for image in self.data.images)]

    def save(self) -> None:
        """Write the checkpoint of this step and remove those that ``--keep-last`` does not keep."""
        settings = {name: getattr(self.args, name) for name in DEFINING} | {"images": self.data_key()}
        folder = self.args.snapshot_dir
        path = folder / f"instances_{self.step:06d}.pth"
        model = self.model.state_dict()
        if broken := not_finite(model):  # no later loss has told, and older checkpoints would go
            raise TrainingError(
                f"step {self.step}: {broken[0]} is not finite; earlier checkpoints are kept, a lower "
                "--learning-rate may help"
            )
        contents = {
            "step": self.step,
            "model": model,
            "config": self.config.to_dict(),
            "settings": settings,
            "categories": self.data.categories,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(contents, path)
        if self.args.keep_last:
            for old in checkpoints(folder)[: -self.args.keep_last]:
                old.unlink()
        tqdm.write(f"saved {path}")


class StopRequest:
    """Notes SIGTERM and SIGINT, so that a run stops after its step; a second SIGINT ends it at once."""

    def __init__(self, process: Process) -> None:
        self.process, self.signum = process, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, signum: int, _: object) -> None:
        if signum == signal.SIGINT == self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self) -> bool:
        """Whether any process was asked to stop."""
        if self.process.world_size > 1:
            self.signum = max(self.process.all_gather_object(self.signum))
        return self.signum != 0


def batches_of(run: Run) -> Iterator[list[Any]]:
    """Batches of the steps that are left: [(image, target), …]."""
    args, process = run.args, run.process
    ratios = [image["width"] / image["height"] for image in run.data.images]
    sampler = StepBatches(
        ratios, args.batch_size, run.step, args.num_steps, args.seed, bool(args.mirror),
        process.rank, process.world_size,
    )  # fmt: skip
    loader = DataLoader(
        TrainDataset(run.data),
        batch_sampler=sampler,
        num_workers=args.num_workers,
        collate_fn=list,
        pin_memory=process.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator().manual_seed(0),  # starting workers draws a number
    )
    return read_by_workers(loader)


def _leave_signals_to_the_run(_: int) -> None:
    """Ctrl-C and torchrun signal all processes; a worker that obeyed would end the step that is to be saved.

    Workers end when the loader is closed, or when they notice that their parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def train_step(run: Run, network: nn.Module, batch: list[Any]) -> dict[str, float]:
    """One step of SGD; the losses by torchvision's names, and their sum as "loss"."""
    args, device = run.args, run.process.device
    # torchvision's samplers draw boxes from the generator: seeded here, there is no state to save.
    torch.manual_seed((args.seed * 1_000_003 + run.step) * 4099 + run.process.rank)
    rate = learning_rate(args.learning_rate, run.step, args.num_steps, args.warm_up)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    images = [image.to(device, non_blocking=True) for image, _ in batch]
    targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for _, target in batch]
    half = PRECISIONS[args.amp]
    with torch.autocast(device.type, half) if half else nullcontext():
        losses = network(images, targets)
        loss = sum(losses.values())
    values = {"loss": loss.item()} | {name: x.item() for name, x in losses.items()}
    if not math.isfinite(values["loss"]):
        raise TrainingError(
            f"step {run.step + 1}: the loss is {values['loss']}; lower --learning-rate or lengthen --warm-up"
        )
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    return values


def train(run: Run) -> int:
    """The loop; the number of the signal that ended it, 0 at its end."""
    args, process = run.args, run.process
    network = run.model.train()
    if process.world_size > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, devices)
    stop = StopRequest(process)
    log = Log(args.snapshot_dir, run.step) if process.is_main else None
    bar = tqdm(total=args.num_steps, initial=run.step, unit="step", mininterval=1, disable=log is None)
    saved, window, since = run.step, [], time.perf_counter()
    for batch in batches_of(run):
        window.append(train_step(run, network, batch))
        bar.update()
        stopping = stop.agreed()
        if log and (run.step % args.log_every == 0 or run.step == args.num_steps):
            means = {name: sum(v[name] for v in window) / len(window) for name in window[0]}
            seconds = (time.perf_counter() - since) / len(window)
            rate = run.optimizer.param_groups[0]["lr"]
            log.write(run.step, means | {"learning_rate": rate, "seconds_per_step": seconds})
            bar.set_postfix(loss=f"{means['loss']:.3f}")
            window, since = [], time.perf_counter()
        if process.is_main and (run.step % args.save_every == 0 or stopping or run.step == args.num_steps):
            run.save()
            saved = run.step
        if stopping:
            break
    bar.close()
    if stop.signum and process.is_main:
        print(f"stopped after step {saved}; --resume goes on from there")
    return stop.signum


class Log:
    """``log.jsonl`` and TensorBoard events; what a killed run wrote beyond its checkpoint is cut off."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() and step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.events.add_scalar(f"train/{name}", value, step)
        self.events.flush()


def main(args: argparse.Namespace) -> None:
    for package in ("torchvision", "pycocotools.mask"):
        require(package)
    with process_group(args.gpu) as process:
        if args.amp == "fp16" and process.device.type == "cpu":
            raise UsageError("--amp fp16 is for GPUs, where it is fast; --amp bf16 also runs on a CPU")
        data = read_split(args.data_dir, args.split)
        run = Run(args, data, process)
        run.restore()
        if process.is_main:
            args.snapshot_dir.mkdir(parents=True, exist_ok=True)
            if not run.step and checkpoints(args.snapshot_dir):
                raise TrainingError(
                    f"{args.snapshot_dir}: holds checkpoints of another run; go on with --resume or choose "
                    "another --snapshot-dir"
                )
            print_summary(run)
        if run.step >= args.num_steps:
            if process.is_main:
                print(f"the run is complete: {run.step} steps are done, --num-steps is {args.num_steps}")
            return
        signum = train(run)
    if signum:
        raise SystemExit(128 + signum)


def print_summary(run: Run) -> None:
    args, config, data, process = run.args, run.config, run.data, run.process
    objects = sum(len(entries) for entries in data.annotations)
    parameters = sum(x.numel() for x in run.model.parameters()) / 1e6
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "CPU"
    print(
        f"data      {data.file}: {len(data.images)} images, {objects} objects, "
        f"{len(data.categories)} categories\n"
        f"network   Mask R-CNN on {config.backbone}-FPN, attention {config.attention}, "
        f"R={config.recurrence}, {parameters:.1f} M parameters, norm {config.norm}\n"
        f"start     {run.origin}\n"
        f"device    {name} x {process.world_size}, amp {args.amp}; attention {cc_attention.backend()}\n"
        f"steps     {run.step} → {args.num_steps} of {args.batch_size} images, "
        f"{args.num_steps * args.batch_size / len(data.images):.3g} epochs, rate {args.learning_rate:g}\n"
        f"writes    {args.snapshot_dir}/ (checkpoints, log.jsonl, TensorBoard events)"
    )
    for note in data.notes:
        print(f"note      {note}")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    run_file = {"settings": settings, "config": config.to_dict(), "torch": str(torch.__version__)}
    (args.snapshot_dir / "run.json").write_text(json.dumps(run_file, indent=1) + "\n")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), "instances.train")
