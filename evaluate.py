"""Evaluate a checkpoint: per-class IoU from one confusion matrix over all images of a split.

The network (backbone, R, …) and the tile size are those that the checkpoint was trained with, unless given;
a plain state dict is taken for the published network, ResNet-101 with R=2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dataset import (
    DATASETS,
    DataError,
    EvaluationDataset,
    LabelTable,
    denormalize,
    find_source,
    load,
    pairs_of,
)
from networks import BACKBONES, MODELS, build_model, fold_norms
from utils.arguments import (
    SWITCH,
    Parser,
    add_data_arguments,
    check_data_arguments,
    count,
    exit_on,
    positive_int,
    scales,
    size,
)
from utils.checkpoint import CheckpointError, load_checkpoint, load_weights, model_state
from utils.distributed import DeviceError, choose_devices
from utils.evaluation import Save, evaluate
from utils.inference import multi_scale, sliding, whole
from utils.logger import side_by_side
from utils.metrics import ConfusionMatrix
from utils.snapshots import find_checkpoint

# What a checkpoint without settings of its own is taken for.
PUBLISHED = {"model": "ccnet", "backbone": "resnet101", "recurrence": 2, "input_size": (769, 769)}


class OutputError(RuntimeError):
    """Results that cannot be written: one line that names the folder and the reason."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_arguments(parser, DATASETS, split="val")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--restore-from", type=Path, required=True, help="checkpoint, or a folder to take the newest from"
    )
    network.add_argument("--model", choices=MODELS, help="as in the checkpoint")
    network.add_argument("--backbone", choices=BACKBONES, help="as in the checkpoint")
    network.add_argument("--recurrence", type=count, help="as in the checkpoint")

    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--whole", **SWITCH, default=False, help="whole images at once instead of sliding windows"
    )
    protocol.add_argument("--input-size", type=size, metavar="H,W", help="tile; the training crop")
    protocol.add_argument(
        "--batch-size", type=positive_int, default=4, help="tiles through the network at once"
    )
    protocol.add_argument("--scales", type=scales, default="1", metavar="S,S,…", help="e.g. 0.75,1,1.25")
    protocol.add_argument(
        "--flip", **SWITCH, default=False, help="average with the mirrored image's prediction"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--gpu", default="auto", help="auto, cpu, or a GPU's number")
    run.add_argument("--output-dir", type=Path, default="results", help="for metrics.json and pictures")
    run.add_argument(
        "--save", **SWITCH, default=False, help="predictions as colours, as label ids and beside the labels"
    )

    args = parser.parse_args(argv)
    check_data_arguments(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    device, *others = choose_devices(args.gpu)
    if others:
        raise DeviceError(f"--gpu {args.gpu}: evaluation takes one GPU")
    source = find_source(args.data_dir, args.dataset, args.num_classes, args.ignore_label)
    pairs = pairs_of(source, args.data_dir, args.split, args.data_list)
    if any(pair.label is None for pair in pairs) and not args.save:
        raise DataError("these images have no labels to be scored against; --save keeps the predictions")
    path, model, settings = load_model(args, source.table.num_classes)
    model.to(device, memory_format=torch.channels_last)
    predict = whole(model) if args.whole else sliding(model, settings["input_size"], args.batch_size)
    metrics_file = prepare_output(args.output_dir)

    matrix = ConfusionMatrix(source.table.num_classes, args.ignore_label, device)
    samples = load(
        EvaluationDataset(pairs, source.table, args.ignore_label),
        args.num_workers,
        pin_memory=device.type == "cuda",
    )
    save = saver(args.output_dir, source.table) if args.save else None
    predict = multi_scale(predict, args.scales, args.flip)
    evaluate(predict, tqdm(samples, total=len(pairs), unit="image", mininterval=1), matrix, device, save)

    if args.save:
        print(f"predictions are in {args.output_dir}/ (colour, ids, panels)")
    if not matrix.counts.any():
        print("no labelled pixel, so there are no scores")
        return
    scored = sum(pair.label is not None for pair in pairs)
    print(matrix.table(source.table.names))
    metrics = matrix.summary(source.table.names) | {
        "settings": {
            "checkpoint": str(path),
            **settings,
            "data_dir": str(args.data_dir),
            "dataset": source.name,
            "split": str(args.data_list or args.split),
            "images": scored,
            "whole": args.whole,
            "scales": args.scales,
            "flip": args.flip,
        }
    }
    metrics_file.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(f"mIoU {100 * metrics['mIoU']:.2f} over {scored} images; written to {metrics_file}")


def prepare_output(directory: Path) -> Path:
    """Where the metrics will go; those of an earlier evaluation are removed, so that none outlives its turn.

    Raises:
        OutputError: the folder cannot be made or written to, which is found before the evaluation.
    """
    metrics_file = directory / "metrics.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        metrics_file.touch()
        metrics_file.unlink()
    except OSError as error:
        raise OutputError(f"{directory}: cannot write results there ({error.strerror})") from None
    return metrics_file


def load_model(args: argparse.Namespace, num_classes: int) -> tuple[Path, nn.Module, dict[str, Any]]:
    """The checkpoint's path, its network in evaluation mode, and the settings it was built with."""
    path = find_checkpoint(args.restore_from)
    checkpoint = load_checkpoint(path)
    trained = checkpoint.get("settings", {})
    try:
        settings = {name: trained.get(name, default) for name, default in PUBLISHED.items()}
        settings |= {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
        height, width = settings["input_size"]
        if min(height, width) < 1:
            raise ValueError(f"input_size {height},{width}")
        model = build_model(settings["model"], num_classes, settings["backbone"], settings["recurrence"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings make no network ({error})") from None
    load_weights(model, model_state(checkpoint), path)
    step = checkpoint.get("step")
    # Normalisation costs nothing once it is part of the convolutions.
    return path, fold_norms(model), settings | {"step": step if isinstance(step, int) else None}


def saver(directory: Path, table: LabelTable) -> Save:
    """A function that writes a prediction as colours, as original label ids, and beside image and label."""
    for folder in ("colour", "ids", "panels"):
        (directory / folder).mkdir(exist_ok=True)

    def write(folder: str, name: str, picture: np.ndarray) -> None:
        Image.fromarray(picture).save(directory / folder / f"{name}.png")

    def save(name: str, image: Tensor, label: Tensor | None, prediction: Tensor) -> None:
        colour = table.colour(prediction.numpy())
        beside = [] if label is None else [table.colour(label.numpy())]
        write("colour", name, colour)
        write("ids", name, table.decode(prediction.numpy()))
        write("panels", name, side_by_side(denormalize(image.numpy()), *beside, colour))

    return save


if __name__ == "__main__":
    exit_on(
        lambda: main(parse_args()),
        usage=(DeviceError,),
        data=(DataError, CheckpointError, OutputError, OSError, MemoryError),
    )
