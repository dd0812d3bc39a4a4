"""The options of ``train.py`` that do not change a run's numbers: data, devices, files."""

import math
from dataclasses import dataclass
from pathlib import Path

from dataset import DataError, DataOptions, DatasetSpec, Pair, list_samples
from training.recipes import Recipe
from utils.arguments import UsageError, default_workers
from utils.distributed import world_size
from utils.fields import setting


@dataclass(frozen=True, kw_only=True)
class RunOptions(DataOptions):
    """Where a run's data, devices and files are; ``train.py`` makes a flag of each field."""

    num_workers: int = setting(
        default_workers(), "processes that read data, for each training process", group="data", min=0
    )

    restore_from: Path | None = setting(
        None, "start from the weights of this checkpoint, state dict or ImageNet backbone", group="network"
    )
    not_restore_last: bool = setting(
        False, "do not load the classifier layers of --restore-from", group="network"
    )

    gpu: str = setting(
        "auto",
        "auto, cpu, a GPU's number, or several (0,1,2,3); torchrun is faster for several",
        group="devices and speed",
    )
    compile: bool = setting(False, "compile the network with torch.compile", group="devices and speed")
    checkpoint_activations: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower", group="devices and speed"
    )
    deterministic: bool = setting(
        False, "GPU kernels that give the same bits again: slower", group="devices and speed"
    )

    snapshot_dir: Path = setting(Path("snapshots"), "folder for checkpoints and logs", group="run")
    start_iters: int = setting(0, "step to start at, for the schedule", group="run", min=0)
    save_pred_every: int = setting(5000, "steps between checkpoints", group="run", min=1)
    keep_last: int = setting(0, "keep the newest K checkpoints; 0: all", group="run", metavar="K", min=0)
    val_every: int = setting(
        0,
        "steps between evaluations, whose best checkpoint is kept; 0: none",
        group="run",
        metavar="N",
        min=0,
    )
    val_split: str | None = setting(None, "split for --val-every (default: val)", group="run")
    val_list: Path | None = setting(None, "list file for --val-every, instead of a split", group="run")
    save_num_images: int = setting(2, "pictures at a time in TensorBoard", group="run", min=0)
    resume: str | None = setting(
        None,
        "continue the run in --snapshot-dir exactly, from its newest checkpoint or the one given; its recipe "
        "holds unless flags change it",
        group="run",
        metavar="CHECKPOINT",
        optional_value="",
    )

    def __post_init__(self) -> None:
        if self.not_restore_last and self.restore_from is None:
            raise UsageError("--not-restore-last needs --restore-from")
        if (self.val_list or self.val_split) and not self.val_every:
            raise UsageError("--val-list and --val-split need --val-every")
        if self.num_gpus > 1 and self.compile:
            raise UsageError(
                f"--compile does not work with --gpu {self.gpu}; use torchrun, one process per GPU"
            )
        if self.checkpoint_activations and self.compile:
            raise UsageError(
                "--checkpoint-activations does not work with --compile, which plans memory itself"
            )

    def validation_samples(self, spec: DatasetSpec) -> list[Pair]:
        """What ``--val-every`` evaluates.

        Raises:
            DataError: no such split, or images without labels.
        """
        split = self.val_split or "val"
        if self.val_list is None and split not in spec.splits:
            splits = ", ".join(spec.splits) or "no splits of its own"
            raise DataError(f"--val-split {split}: {spec.name} has {splits}; give --val-list")
        pairs = list_samples(spec, self.data_dir, split, self.val_list)
        if any(pair.label is None for pair in pairs):
            where = self.val_list or f"--val-split {split}"
            raise DataError(f"{where}: has images without labels, which --val-every cannot score")
        return pairs

    def joint(self) -> dict[str, object]:
        """What decides when processes exchange something, and so must be the same in all of them."""
        names = ("start_iters", "val_every", "save_pred_every", "compile", "checkpoint_activations")
        return {name: getattr(self, name) for name in names}

    @property
    def num_gpus(self) -> int:
        """Devices of this process."""
        return self.gpu.count(",") + 1

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError where the recipe's batch cannot be computed on these devices."""
        if self.start_iters >= recipe.num_steps:
            raise UsageError(f"--start-iters {self.start_iters} is not below --num-steps {recipe.num_steps}")
        processes, gpus = world_size(), self.num_gpus
        parts = processes * gpus
        if recipe.batch_size % (parts * recipe.accumulate):
            shared = f" over {processes} processes" * (processes > 1) + f" over {gpus} GPUs" * (gpus > 1)
            into = f" into {recipe.accumulate} parts" * (recipe.accumulate > 1)
            raise UsageError(f"--batch-size {recipe.batch_size} cannot be split{into}{shared}")
        if recipe.freeze_bn:  # which needs no statistics of the batch
            return
        synchronised = recipe.network.norm in ("auto", "sync")
        images = recipe.batch_size // recipe.accumulate // (1 if synchronised else parts) * recipe.clip
        if images == 1 and recipe.network.needs_two_images:
            raise UsageError(
                f"--model {recipe.network.model} normalises means of images, and that of one image has no "
                "variance: raise --batch-size"
                + " or lower --accumulate" * (recipe.accumulate > 1)
                + " or take --norm sync" * (parts > 1 and not synchronised)
            )
        if images * math.prod(_feature_side(side, recipe.network.stem) for side in recipe.input_size) < 2:
            raise UsageError("one feature a batch has no variance: raise --input-size or --batch-size")


def _feature_side(pixels: int, stem: str) -> int:
    """Height or width of the features of a ResNet, as its convolutions and its pooling round."""
    after_conv = (pixels + 1) // 2
    after_pool = (after_conv + 1) // 2 if stem == "v1c" else after_conv // 2 + 1  # ceil_mode
    return (after_pool + 1) // 2
