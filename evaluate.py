"""Evaluate a checkpoint: per-class IoU from one confusion matrix over all images of a split.

The network (backbone, R, …) and the tile size are those that the checkpoint was trained with, unless given;
what a plain state dict does not tell is taken to be as published, R=2 for one.
"""

from utils import startup

startup.prepare()  # before imports that take seconds

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dataset import (
    Clip,
    DataError,
    DatasetSpec,
    EvaluationDataset,
    Normalization,
    Pair,
    Sample,
    check_supervision,
    evaluation_clips,
    find_dataset,
    fingerprint,
    generic_table,
    list_samples,
    load_samples,
)
from evaluation.checkpoint import TrainedOn, labels_of, trained_on
from evaluation.inference import (
    Fit,
    Predict,
    describe_fit,
    multi_scale,
    short_sides,
    sliding,
    whole,
)
from evaluation.metrics import ConfusionMatrix
from evaluation.options import EvaluationOptions
from evaluation.pictures import Save, prediction_writer
from evaluation.report import ImageReports, check_comparable, protocol_differences, read_metrics, report_page
from evaluation.scores import count_predictions
from evaluation.submission import Submission
from networks import fold_norms, restore_model
from training.provenance import versions
from training.recipes import find_recipe
from training.snapshots import find_checkpoint
from utils.arguments import OutputError, UsageError, parse_options, run_script
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.distributed import Process, process_group
from utils.fields import describe_differences
from utils.files import sha256_of, write_atomically


def main() -> None:
    options = parse_options(EvaluationOptions, __doc__)
    if "," in options.gpu:
        raise UsageError(f"--gpu {options.gpu}: evaluation takes one GPU for each process; use torchrun")
    with process_group(options.gpu) as process, ExitStack() as stack:
        with process.all_or_none():
            evaluation = build(options, process, stack)
        check_same_start(evaluation, options, process)
        submission, reports = evaluation.submission, evaluation.reports
        began = time.perf_counter()
        with process.all_or_none():
            bar = tqdm(
                evaluation.loaded, total=evaluation.num_images, unit="image", disable=not process.is_main
            )
            count_predictions(evaluation.predict, bar, evaluation.matrix, process, evaluation.save)
            if submission is not None:
                submission.close()
        seconds = time.perf_counter() - began
        evaluation.matrix.add_processes(process)
        if reports is not None:
            for others in process.all_gather_object([*reports.worst, *reports.best]):
                reports.add(others)
        with process.all_or_none():
            if process.is_main:
                write_results(evaluation, options, seconds)


@dataclass
class Evaluation:
    """A network, the samples that this process predicts, and where the counts go."""

    settings: dict[str, Any]  # for metrics.json
    checkpoint_hash: str  # where there are processes to compare it with
    spec: DatasetSpec
    pairs: list[Pair]
    num_images: int  # images of this process
    loaded: Iterator[Sample]
    predict: Predict
    matrix: ConfusionMatrix
    save: Save | None
    metrics_file: Path
    submission: Submission | None
    reports: ImageReports | None
    other: tuple[str, dict[str, Any]] | None  # to compare with


def build(options: EvaluationOptions, process: Process, stack: ExitStack) -> Evaluation:
    """Checkpoint, data and network of a command line; ``stack`` removes what is of no use afterwards."""
    if options.recipe:
        find_recipe(options.recipe)  # for what its module registers
    path = find_checkpoint(options.restore_from)
    checkpoint = load_checkpoint(path)
    trained = trained_on(checkpoint, path)
    names = ("model", "backbone", "recurrence")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    model, config = restore_model(checkpoint, path, **given)
    spec, pairs = find_samples(options, trained, config.num_classes)
    other = None
    if options.compare is not None:  # before the output folder is prepared, which may be the same
        other = (str(options.compare), read_metrics(options.compare))
        check_comparable(other[1], spec.name, spec.labels.names, options.compare)
    doubts = check_supervision(pairs, spec.labels, spec.ignore_label, training=False)
    doubts += check_classes(checkpoint, path, config.num_classes, spec)
    if process.is_main and doubts:
        print("\n".join(doubts))
    normalization = Normalization(config.mean, config.std, config.channel_order)
    metrics_file = prepare_output(options.output_dir)

    # Normalisation costs nothing once it is part of the convolutions.
    network = fold_norms(model).to(process.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tile_size = options.input_size or trained.crop
    fit: Fit = None
    if not options.short_sides:
        fit = trained.fit if options.fit is None else options.fit or None
    if process.is_main and fit is not None:
        print(f"images are scaled to {describe_fit(fit)}; --fit none keeps their size")
    clip = options.clip or trained.clip
    samples: Sequence[Pair | Clip] = pairs
    if clip > 1:
        samples, strides = evaluation_clips(spec, pairs, clip)
        if process.is_main:
            print("\n".join(strides))
    dataset = EvaluationDataset(samples, spec.labels, normalization, spec.ignore_label)
    share = dataset.share(process.rank, process.world_size)
    submission = reports = None
    if options.submission:
        submission = Submission(options.submission, spec.labels, process.rank, process.world_size)
        stack.callback(submission.remove_parts)
    if options.report:
        reports = ImageReports(options.report_images, spec.labels, spec.ignore_label, normalization)
    writer = prediction_writer(options.output_dir, spec.labels, normalization) if options.save else None
    return Evaluation(
        settings={
            "checkpoint": str(path),
            **{name: getattr(config, name) for name in names},
            "input_size": tile_size,
            "fit": fit,
            "step": trained.step,
            "clip": clip,
        },
        checkpoint_hash=sha256_of(path)[:12] if process.world_size > 1 else "",
        spec=spec,
        pairs=pairs,
        num_images=len(share),
        loaded=load_samples(share, options.num_workers, pin_memory=process.device.type == "cuda"),
        predict=predict_as(options, network, tile_size, fit, spec.labels.mirror_pairs),
        matrix=ConfusionMatrix(spec.labels.num_classes, spec.ignore_label, process.device),
        save=in_turn(writer, submission, reports),
        metrics_file=metrics_file,
        submission=submission,
        reports=reports,
        other=other,
    )


def check_same_start(evaluation: Evaluation, options: EvaluationOptions, process: Process) -> None:
    """All processes, perhaps on several machines, must see the same images and checkpoint, and score alike.

    Raises:
        DataError: in the main process, if files differ; PeerError in the others.
        UsageError: likewise, if settings differ.
    """
    images = fingerprint(evaluation.pairs, options.data_dir)
    files = f"{images}, checkpoint {evaluation.checkpoint_hash}"
    settings = {name: value for name, value in evaluation.settings.items() if name != "checkpoint"}
    settings |= {"dataset": evaluation.spec.name, "ignore_label": evaluation.spec.ignore_label}
    settings |= options.joint()
    difference = process.find_difference((files, settings))
    if difference is None:
        return
    rank, (here, own), (there, other) = difference
    if here != there:
        raise DataError(
            f"the processes see different files: {here}, but process {rank} has {there}; "
            "all machines must see the same --data-dir and --restore-from"
        )
    differ = ", ".join(describe_differences(own, other))
    raise UsageError(f"process {rank} was started with other settings: {differ}")


def find_samples(
    options: EvaluationOptions, trained: TrainedOn, classes: int
) -> tuple[DatasetSpec, list[Pair]]:
    """The data set and the samples of a command line, for a network of so many classes.

    Raises:
        DataError: samples without labels, where these are needed.
        UsageError: a submission of another data set than Cityscapes.
    """
    ignore_label = trained.ignore_label if options.ignore_label is None else options.ignore_label
    num_classes = options.num_classes
    if num_classes is None and options.dataset == "list":
        num_classes = classes
    spec = find_dataset(options.data_dir, options.dataset, num_classes, ignore_label)
    pairs = list_samples(spec, options.data_dir, options.split, options.data_list)
    unlabelled = next((pair.image for pair in pairs if pair.label is None), None)
    if unlabelled is not None:
        if options.report:
            raise DataError(f"--report: {unlabelled} has no label to be scored against")
        if not (options.save or options.submission):
            raise DataError(f"{unlabelled} has no label to be scored against; --save keeps the predictions")
    if options.submission and spec.name != "cityscapes":
        raise UsageError(f"--submission is for Cityscapes' server; this data set is {spec.name}")
    return spec, pairs


def predict_as(
    options: EvaluationOptions,
    network: nn.Module,
    tile_size: tuple[int, int],
    fit: Fit,
    mirror_pairs: Sequence[tuple[int, int]],
) -> Predict:
    """The network's predictions under the protocol of a command line."""
    if options.whole:
        predict = whole(network, options.amp)
    else:
        predict = sliding(network, tile_size, options.batch_size, options.amp)
    if options.short_sides:
        return short_sides(predict, options.short_sides, options.flip, mirror_pairs)
    return multi_scale(predict, options.scales, options.flip, mirror_pairs, fit)


def check_classes(checkpoint: dict[str, Any], path: Path, classes: int, spec: DatasetSpec) -> list[str]:
    """Refuse a network of other classes than the data set; returns a line where names differ.

    Raises:
        CheckpointError: their number differs, or their order.
    """
    generic = names = generic_table(classes).names
    with suppress(CheckpointError):
        names = labels_of(checkpoint, path, classes, classes).names
    if classes != spec.labels.num_classes:
        named = f" ({', '.join(names[:2])}, …)" if names != generic else ""
        raise CheckpointError(
            f"{path}: has {classes} classes{named}, {spec.name} has {spec.labels.num_classes}"
        )
    if names == spec.labels.names or generic in (names, spec.labels.names):
        return []
    index = next(i for i, name in enumerate(names) if name != spec.labels.names[i])
    difference = (
        f"class {index} is {names[index]} in the checkpoint, {spec.labels.names[index]} in {spec.name}"
    )
    if sorted(names) == sorted(spec.labels.names):
        raise CheckpointError(f"{path}: names the classes in another order: {difference}")
    return [f"note      {difference}: scores are right only if they mean the same"]


def in_turn(*all_savers: Save | None) -> Save | None:
    """A function that hands a prediction to all that are there; None: there are none."""
    savers = [each for each in all_savers if each is not None]

    def save(sample: Sample, prediction: np.ndarray) -> None:
        for each in savers:
            each(sample, prediction)

    return save if savers else None


def write_results(evaluation: Evaluation, options: EvaluationOptions, seconds: float) -> None:
    """Print the table; write ``metrics.json``, the submission's archive and the report."""
    matrix, spec, images = evaluation.matrix, evaluation.spec, len(evaluation.pairs)
    speed = images / seconds
    print(f"{images} images in {seconds:.1f} s, {speed:.3g} images/s")
    if options.save:
        print(f"predictions are in {options.output_dir}/ (colour, ids, panels)")
    if evaluation.submission is not None:
        count = evaluation.submission.finish()
        print(f"{count} predictions for Cityscapes' server are in {options.submission}")
    if not matrix.counts.any():
        print("no labelled pixel, so there are no scores")
        return
    scored = sum(pair.label is not None for pair in evaluation.pairs)
    print(matrix.table(spec.labels.names))
    metrics = matrix.summary(spec.labels.names) | {
        "images_per_second": speed,
        "settings": {
            **evaluation.settings,
            "data_dir": str(options.data_dir),
            "dataset": spec.name,
            "split": str(options.data_list or options.split),
            "images": scored,
            **{name: getattr(options, name) for name in ("whole", "scales", "short_sides", "flip", "amp")},
        },
    }
    try:
        write_atomically(evaluation.metrics_file, json.dumps(metrics, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{evaluation.metrics_file}: cannot write the scores ({error.strerror})") from None
    if evaluation.reports is not None:
        page = report_page(metrics, spec.labels.palette, evaluation.reports, versions(), evaluation.other)
        file = options.output_dir / "report.html"
        try:
            write_atomically(file, page)
        except OSError as error:
            raise OutputError(f"{file}: cannot write the report ({error.strerror})") from None
        print(f"the report is in {file}")
        if evaluation.other and (differs := protocol_differences(metrics, evaluation.other[1])):
            print(f"{evaluation.other[0]} was scored otherwise: {differs}")
    classes, file = matrix.num_scored(), evaluation.metrics_file
    mean_of = f", mean of {classes} of {matrix.num_classes} classes" if classes < matrix.num_classes else ""
    print(f"mIoU {100 * metrics['mIoU']:.2f} over {scored} images{mean_of}; written to {file}")


def prepare_output(directory: Path) -> Path:
    """Where the metrics will go; results of an earlier evaluation are removed, so that a failure leaves none.

    Raises:
        OutputError: the folder cannot be made or written to, which is found before the evaluation.
    """
    metrics_file = directory / "metrics.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        metrics_file.touch()
        for stale in (metrics_file, directory / "report.html"):
            stale.unlink(missing_ok=True)  # of several processes another may have been faster
    except OSError as error:
        raise OutputError(f"{directory}: cannot write results there ({error.strerror})") from None
    return metrics_file


if __name__ == "__main__":
    run_script(main)
