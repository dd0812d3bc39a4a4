"""Options of instances.train, their defaults and what they must fulfil."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import torch

from instances.errors import UsageError
from instances.model import ATTENTIONS, BACKBONES, NORMS, MaskRCNNConfig
from utils.arguments import default_workers
from utils.distributed import world_size

DESCRIPTION = "Train Mask R-CNN with criss-cross attention on COCO. Without options: the published setting."
REFERENCE_BATCH = 16  # the published rate and schedule are for this many images a step
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that a flag has itself; where there is none its help tells what holds instead."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "instances.train", description=DESCRIPTION, allow_abbrev=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    default = {field.name: field.default for field in fields(MaskRCNNConfig)}

    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, required=True, help="COCO's folder")
    data.add_argument("--split", default="train2017", help="instances_<split>.json and <split>/")
    data.add_argument("--mirror", type=int, choices=(0, 1), default=1, help="mirror half of the images")
    data.add_argument("--num-workers", type=int, default=default_workers(), help="processes that read data")

    net = parser.add_argument_group("network")
    net.add_argument("--backbone", choices=BACKBONES, default="resnet50", help="with a feature pyramid")
    net.add_argument(
        "--attention", choices=ATTENTIONS, default="criss_cross", help="layer in the third stage"
    )
    net.add_argument("--recurrence", type=int, help="rounds R; default: 2, for nonlocal 1, 0 means none")
    net.add_argument(
        "--weights", default="imagenet",
        help="start from: imagenet or coco (torchvision's, downloaded), none, or a file",
    )  # fmt: skip
    net.add_argument(
        "--not-restore-last", action="store_true", help="do not load the layers whose size is the classes'"
    )
    net.add_argument("--norm", choices=NORMS, help="default: frozen with weights, batch without")
    net.add_argument(
        "--trainable-layers", type=int, help="stages trained; default: 3 with weights, 5 without"
    )
    for name, text in (
        ("min_size", "images are scaled to this short side"),
        ("max_size", "but no longer than this"),
        ("anchor_size", "side of the smallest anchors in pixels"),
        ("roi_samples", "boxes an image that the box head is trained on"),
        ("proposals", "proposals an image kept in training; evaluation keeps half"),
    ):
        net.add_argument(f"--{name.replace('_', '-')}", type=int, default=default[name], help=text)

    recipe = parser.add_argument_group("schedule")
    recipe.add_argument("--batch-size", type=int, default=16, help="images a step over all GPUs")
    recipe.add_argument("--num-steps", type=int, help="default: the 1x schedule, 90000 · 16 / batch size")
    recipe.add_argument("--learning-rate", type=float, help="default: 0.02 · batch size / 16")
    recipe.add_argument("--warm-up", type=int, default=500, help="steps in which the rate rises")
    recipe.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    recipe.add_argument("--weight-decay", type=float, default=1e-4, help="of SGD")
    recipe.add_argument("--seed", type=int, default=12345, help="of weights, order, mirroring, sampled boxes")

    run = parser.add_argument_group("run")
    run.add_argument("--gpu", default="auto", help="auto, cpu or a GPU's number; several: use torchrun")
    run.add_argument("--amp", choices=PRECISIONS, default="off", help="compute in a half type")
    run.add_argument(
        "--snapshot-dir", type=Path, default=Path("snapshots/instances"), help="what a run writes"
    )
    run.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    run.add_argument("--keep-last", type=int, default=2, help="keep the newest K checkpoints; 0: all")
    run.add_argument("--log-every", type=int, default=20, help="steps between lines of the log")
    run.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --snapshot-dir"
    )
    args = parser.parse_args(argv)
    complete(args)
    return args


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options, and check what options must fulfil.

    Raises:
        UsageError: the option, its value and what it must be.
    """
    for name, least in (
        ("batch_size", 1), ("warm_up", 0), ("save_every", 1), ("log_every", 1), ("keep_last", 0),
        ("num_workers", 0), ("seed", 0), ("momentum", 0), ("weight_decay", 0),
    ):  # fmt: skip
        if not getattr(args, name) >= least:
            raise UsageError(
                f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}"
            )
    if args.seed >= 2**31:  # the steps' own seeds, made from it, have 63 bits
        raise UsageError(f"--seed must be below {2**31}; got {args.seed}")
    if args.num_steps is None:
        args.num_steps = 90000 * REFERENCE_BATCH // args.batch_size
    if args.learning_rate is None:
        args.learning_rate = 0.02 * args.batch_size / REFERENCE_BATCH
    for name in ("num_steps", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0; got {getattr(args, name)}")
    if args.batch_size % world_size():
        raise UsageError(f"--batch-size {args.batch_size} cannot be split over {world_size()} processes")
    if "," in args.gpu:
        raise UsageError(f"--gpu {args.gpu}: for several GPUs start instances.train by torchrun")
    if args.recurrence is None:
        args.recurrence = {"criss_cross": 2, "nonlocal": 1, "none": 0}[args.attention]
    if args.recurrence == 0:
        args.attention = "none"
    has_weights = args.weights != "none"
    args.norm = args.norm or ("frozen" if has_weights else "batch")
    if args.trainable_layers is None:
        args.trainable_layers = 3 if has_weights else 5


def config_of(args: argparse.Namespace, num_classes: int, norm_eps: float = 1e-5) -> MaskRCNNConfig:
    """The network of a command line.

    Args:
        norm_eps: what the normalisation of its weights was trained with.

    Raises:
        UsageError: an option is out of its range.
    """
    names = [field.name for field in fields(MaskRCNNConfig) if hasattr(args, field.name)]
    try:
        return MaskRCNNConfig(
            num_classes=num_classes, norm_eps=norm_eps, **{name: getattr(args, name) for name in names}
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
