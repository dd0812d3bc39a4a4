"""The options of ``evaluate.py``, and those that all scripts on a checkpoint have."""

from dataclasses import dataclass
from pathlib import Path

from dataset import DataOptions
from utils.arguments import MAX_SIDE, UsageError, default_workers
from utils.fields import REQUIRED, setting

AMP = ("auto", "bf16", "fp16", "off")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Which network a script works on; each field is a flag."""

    restore_from: Path = setting(REQUIRED, "checkpoint, or a folder to take the newest from", group="network")
    recipe: str | None = setting(
        None, "module:NAME of a file of yours, to know what it registers", group="network", metavar="NAME"
    )
    num_classes: int | None = setting(
        None,
        "classes of a checkpoint without class names, which get numbers",
        group="network",
        min=1,
        max=255,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CheckpointOptions, DataOptions):
    """What is evaluated, how, and where results go; ``evaluate.py`` makes a flag of each field."""

    split: str = setting("val", "split of the data set", group="data")
    num_workers: int = setting(default_workers(), "processes that read data", group="data", min=0)
    num_classes: int | None = setting(
        None,
        "number of classes, for --dataset list (default: the checkpoint's)",
        group="data",
        min=1,
        max=255,
    )
    ignore_label: int | None = setting(
        None, "label value that does not count (default: the checkpoint's)", group="data", min=0, max=255
    )

    model: str | None = setting(None, "the model (default: the checkpoint's)", group="network")
    backbone: str | None = setting(None, "the backbone (default: the checkpoint's)", group="network")
    recurrence: int | None = setting(None, "rounds R (default: the checkpoint's)", group="network", min=0)

    clip: int | None = setting(
        None, "frames of a clip (default: the checkpoint's)", group="protocol", metavar="T", min=1
    )
    whole: bool = setting(False, "predict whole images at once instead of sliding windows", group="protocol")
    input_size: tuple[int, int] | None = setting(
        None, "tile of the sliding window (default: the training crop)", group="protocol", metavar="H,W"
    )
    batch_size: int = setting(
        4, "tiles, or frames of them, through the network at once", group="protocol", min=1
    )
    scales: tuple[float, ...] = setting(
        (1.0,), "factors of the image's size after --fit, 0.75,1,1.25 for one; logits are averaged",
        group="protocol", metavar="S,S,…", exclusive_min=0, max=8,
    )  # fmt: skip
    short_sides: tuple[int, ...] = setting(
        (), "lengths of the short side in pixels, the long one at most 1000, instead of --scales (ADE20K's "
        "protocol)", group="protocol", metavar="N,N,…", min=1, max=MAX_SIDE,
    )  # fmt: skip
    fit: tuple[int, int] | tuple[()] | None = setting(
        None, "size that images are fitted into first; none: their own (default: what the recipe says)",
        group="protocol", metavar="H,W", may_be_none=True,
    )  # fmt: skip
    flip: bool = setting(False, "average with the mirrored image's prediction", group="protocol")

    gpu: str = setting("auto", "auto, cpu, or a GPU's number; use torchrun for several", group="run")
    amp: str = setting(
        "off", "compute in a half type; auto: bf16 where the device is fast at it", group="run", choices=AMP
    )
    output_dir: Path = setting(Path("results"), "folder for metrics.json and pictures", group="run")
    save: bool = setting(
        False, "write predictions as colours, as label ids, and beside image and label", group="run"
    )

    report: bool = setting(
        False, "write report.html: scores, confusions, worst and best images in one file", group="run"
    )
    report_images: int = setting(
        4, "how many of the worst and of the best images --report shows", group="run", metavar="N", min=0
    )
    compare: Path | None = setting(
        None, "metrics.json of another run, for --report to compare with", group="run", metavar="FILE"
    )
    submission: Path | None = setting(
        None, "pack label ids for Cityscapes' server, with --split test", group="run", metavar="OUT.zip"
    )

    def __post_init__(self) -> None:
        if self.compare is not None and not self.report:
            raise UsageError("--compare needs --report")
        if self.submission is not None and self.submission.suffix != ".zip":
            raise UsageError(f"--submission {self.submission}: the ending must be .zip")
        if self.short_sides and self.scales != (1.0,):
            raise UsageError("--short-sides and --scales exclude each other")
        if self.short_sides and self.fit:
            raise UsageError("--short-sides and --fit exclude each other")

    def joint(self) -> dict[str, object]:
        """What must be the same in all processes, beside what the checkpoint may decide."""
        protocol = ("whole", "scales", "short_sides", "flip", "amp")
        results = ("save", "report", "report_images", "submission")
        return {name: getattr(self, name) for name in (*protocol, *results)}
