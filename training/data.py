"""The data of a run: training samples with their augmentation, and what is evaluated on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from dataset import (
    Clip,
    DatasetSpec,
    EvaluationDataset,
    Normalization,
    Pair,
    TrainDataset,
    check_supervision,
    evaluation_clips,
    find_dataset,
    fingerprint,
    list_samples,
    training_clips,
)
from training.options import RunOptions
from training.recipes import Recipe, transform_of
from utils.arguments import UsageError


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run; the fingerprints are what a resumed run recognises them by."""

    spec: DatasetSpec
    train: TrainDataset
    images: str  # fingerprint
    validation: EvaluationDataset | None
    validation_images: str
    remarks: list[str]  # doubts about the labels, and the stride of clips


def load_data(spec: DatasetSpec, recipe: Recipe, options: RunOptions) -> TrainingData:
    """The samples that the options name, as the recipe wants them.

    Raises:
        DataError: files that are missing, labels that cannot teach, a clip longer than its sequences.
    """
    config = recipe.network
    normalization = Normalization(config.mean, config.std, config.channel_order)
    pairs = list_samples(spec, options.data_dir, options.split, options.data_list)
    remarks = check_supervision(pairs, spec.labels, spec.ignore_label)
    samples: Sequence[Pair | Clip] = pairs
    if recipe.clip > 1:
        samples, strides = training_clips(spec, pairs, recipe.clip)
        remarks += strides
    transform = transform_of(recipe, normalization, spec)
    validation, validation_pairs = None, []
    if options.val_every:
        validation_pairs = options.validation_samples(spec)
        remarks += check_supervision(validation_pairs, spec.labels, spec.ignore_label, training=False)
        whole: Sequence[Pair | Clip] = validation_pairs
        if recipe.clip > 1:
            whole, _ = evaluation_clips(spec, validation_pairs, recipe.clip)
        validation = EvaluationDataset(whole, spec.labels, normalization, spec.ignore_label)
    return TrainingData(
        spec,
        TrainDataset(samples, spec.labels, transform, recipe.random_seed),
        fingerprint(pairs, options.data_dir),
        validation,
        fingerprint(validation_pairs, options.data_dir),
        remarks,
    )


def find_data(options: RunOptions, recipe: Recipe, num_classes: int | None) -> tuple[DatasetSpec, Recipe]:
    """The data set, and the recipe with its number of classes.

    Raises:
        UsageError: a "list" whose file or number of classes is not given.
        DataError: as of ``find_dataset``.
    """
    needed = {"--data-list": options.data_list, "--num-classes": num_classes}
    missing = [flag for flag, value in needed.items() if value is None]
    if options.dataset == "list" and missing:
        raise UsageError(f"--dataset list needs {' and '.join(missing)}")
    spec = find_dataset(options.data_dir, options.dataset, num_classes, recipe.ignore_label)
    return spec, recipe.with_changes({"num_classes": spec.labels.num_classes}, {})
