"""Recipes: everything that decides the numbers of a training run, beside its data and its first weights."""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from dataset import AffineTransform, DatasetSpec, Normalization, TrainTransform
from networks.config import NetworkConfig
from training.category_loss import KINDS
from training.criterion import CRITERIA
from training.schedule import SCHEDULES
from utils.arguments import MAX_SIDE, UsageError, flag_of, format_value
from utils.fields import check_fields, describe_differences, from_dict, setting, to_dict

# The dtype that convolutions and attention compute in.
PRECISIONS: dict[str, torch.dtype | None] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. The defaults are the published ones for Cityscapes, R=2 with OHEM.

    ``train.py`` makes a flag of each field; a checkpoint stores them; a resumed run is compared by them.

    Raises:
        ValueError: a value out of bounds; the message names field and value.
    """

    network: NetworkConfig = NetworkConfig()

    input_size: tuple[int, int] = setting(
        (769, 769), "crop in pixels", group="augmentation", metavar="H,W", min=1
    )
    random_scale: bool = setting(True, "scale images by 0.7, 0.8 … 2.1", group="augmentation")
    short_sides: tuple[int, ...] = setting(
        (),
        "scale the short side to one of these pixels (the long one to at most 1000), whatever --random-scale "
        "says; none: by factors only",
        group="augmentation",
        metavar="N,N,…",
        min=1,
        max=MAX_SIDE,
    )
    random_affine: bool = setting(
        False,
        "fit the whole image into the crop, scaled by up to 25 % and rotated, instead of cropping",
        group="augmentation",
    )
    eval_short_side: int = setting(
        0,
        "short side of images in validation and prediction (the long one is at most 1000); 0: the crop that "
        "--random-affine fits them into, or their own size",
        group="augmentation",
        metavar="N",
        min=0,
        max=MAX_SIDE,
    )
    random_mirror: bool = setting(True, "mirror left and right with probability 0.5", group="augmentation")
    clip: int = setting(
        1, "frames of a clip, for networks over time", group="augmentation", metavar="T", min=1
    )
    ignore_label: int = setting(255, "label value that does not count", group="augmentation", min=0, max=255)

    criterion: str = setting("default", "the loss", group="loss", choices=CRITERIA)
    ohem: bool = setting(True, "learn from hard pixels only (online hard example mining)", group="loss")
    ohem_thres: float = setting(
        0.7, "a pixel is hard up to this probability of its class", group="loss", min=0, max=1
    )
    ohem_keep: int = setting(100000, "least number of pixels kept, for every two images", group="loss", min=0)
    aux_weight: float = setting(0.4, "weight of the auxiliary head's cross entropy", group="loss", min=0)
    ccl: bool = setting(False, "add the category consistent loss", group="loss")
    ccl_kind: str = setting(
        "piecewise", "distance within a class in the category consistent loss", group="loss", choices=KINDS
    )

    batch_size: int = setting(8, "images of a step, over all devices", group="schedule", min=1)
    num_steps: int = setting(60000, "length of the run", group="schedule", min=1)
    schedule: str = setting("poly", "how the learning rate falls", group="schedule", choices=SCHEDULES)
    learning_rate: float = setting(1e-2, "learning rate at step 0", group="schedule", exclusive_min=0)
    power: float = setting(0.9, "exponent of the polynomial schedule", group="schedule", min=0)
    momentum: float = setting(0.9, "momentum of SGD", group="schedule", min=0, max=1)
    weight_decay: float = setting(1e-4, "weight decay of SGD", group="schedule", min=0)
    freeze_bn: bool = setting(
        False,
        "fine-tune: keep statistics, weights and biases of the normalisation",
        group="schedule",
        flags=("--ft",),
    )
    random_seed: int = setting(
        12345, "seed of weights, order, augmentation and dropout", group="schedule", min=0, max=2**32 - 1
    )
    amp: str = setting("off", "compute in a half type", group="schedule", choices=PRECISIONS)
    accumulate: int = setting(1, "compute a step's batch in N parts", group="schedule", metavar="N", min=1)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def fit(self) -> tuple[int, int] | int | None:
        """How evaluation scales images, see ``evaluation.inference.Fit``."""
        return self.eval_short_side or (self.input_size if self.random_affine else None)

    def with_changes(self, network: Mapping[str, Any], values: Mapping[str, Any]) -> "Recipe":
        """This recipe with other values for some fields, and for some of its network.

        Raises:
            UsageError: a value out of bounds, or settings that contradict each other.
        """
        try:
            changed = replace(self, network=self.network.with_changes(network), **values)
        except ValueError as error:
            raise UsageError(str(error)) from None
        changed._check_together()
        if changed.random_affine and values.get("random_scale"):
            raise UsageError("--random-affine and --random-scale exclude each other")
        return changed

    def _check_together(self) -> None:
        if self.batch_size % self.accumulate:
            raise UsageError(f"--batch-size {self.batch_size} cannot be split into {self.accumulate} parts")
        if self.random_affine and self.short_sides:
            raise UsageError("--random-affine and --short-sides exclude each other")


CITYSCAPES = Recipe()

RECIPES: dict[str, Recipe] = {
    # ICCV 2019, section 4.2, and the reference's README.
    "cityscapes": CITYSCAPES,
    # Section 4.3 and the scene parsing benchmark's code; the crop is that of later codes.
    "ade20k": replace(
        CITYSCAPES,
        network=NetworkConfig(num_classes=150),
        input_size=(512, 512),
        random_scale=False,
        short_sides=(300, 375, 450, 525, 600),
        eval_short_side=450,
        learning_rate=2e-2,
        batch_size=16,
        num_steps=150000,
        ohem=False,
    ),
    # TPAMI 2020, section 4.4: 150 epochs of 30,462 images in batches of 40.
    "lip": replace(
        CITYSCAPES,
        network=NetworkConfig(num_classes=20),
        input_size=(473, 473),
        random_scale=False,
        random_affine=True,
        learning_rate=7e-3,
        batch_size=40,
        num_steps=114233,
        ohem=False,
    ),
    # Ours: CamVid at half its size, ResNet-18, for a processor (docs/results/camvid_study.md).
    "camvid": replace(
        CITYSCAPES,
        network=NetworkConfig(num_classes=11, backbone="resnet18", stem="plain", initial_gamma=1.0),
        input_size=(180, 240),
        short_sides=(150, 165, 180, 200, 220, 240),
        eval_short_side=180,
        batch_size=6,
        num_steps=2400,
        learning_rate=0.03,
        ohem=False,
    ),
}


def find_recipe(name: str) -> Recipe:
    """A published recipe, or ``NAME`` of a module that a user wrote: ``module:NAME``.

    The module is looked for in the working folder too. It may add heads, data sets and losses.

    Raises:
        UsageError: no such recipe, or the module cannot be imported.
    """
    if ":" not in name:
        if name not in RECIPES:
            raise UsageError(f"--recipe {name}: expected one of {', '.join(RECIPES)}, or module:NAME")
        return RECIPES[name]
    module_name, attribute = name.split(":", 1)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = ""
        for caller, frame in pairwise(traceback.extract_tb(error.__traceback__)):
            if caller.filename.startswith("<frozen importlib") and not frame.filename.startswith("<frozen"):
                where = f", {frame.filename}:{frame.lineno}"  # in the innermost module of those imported
        raise UsageError(f"--recipe {name}: cannot import {module_name} ({reason}{where})") from None
    recipe = getattr(module, attribute, None)
    if not isinstance(recipe, Recipe):
        found = "does not exist" if recipe is None else f"is of type {type(recipe).__name__}"
        raise UsageError(f"--recipe {name}: expected a Recipe, but {module_name}.{attribute} {found}")
    return recipe


def transform_of(
    recipe: Recipe, normalization: Normalization, spec: DatasetSpec
) -> TrainTransform | AffineTransform:
    """The recipe's augmentation."""
    common: dict[str, Any] = {
        "mirror": recipe.random_mirror,
        "ignore_label": spec.ignore_label,
        "normalization": normalization,
        "mirror_pairs": spec.labels.mirror_pairs,
    }
    if recipe.random_affine:
        return AffineTransform(recipe.input_size, **common)
    return TrainTransform(
        recipe.input_size, scale=recipe.random_scale, short_sides=recipe.short_sides, **common
    )


def format_recipe(recipe: Recipe) -> str:
    """A recipe as the flags that make it, one a line."""
    values = recipe.network.to_dict() | recipe_to_dict(recipe)
    flags = ((flag_of(name), format_value(value)) for name, value in values.items())
    # After a blank, a value that begins with a minus would be read as a flag.
    return "\n".join(f"{flag}={text}" if text.startswith("-") else f"{flag} {text}" for flag, text in flags)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, without its network."""
    values = to_dict(recipe)
    del values["network"]
    return values


def recipe_from_dict(values: Mapping[str, Any], network: NetworkConfig) -> Recipe:
    """What ``recipe_to_dict`` gave, with its network.

    Raises:
        ValueError: an unknown field, or a value of another type or out of bounds.
    """
    return from_dict(Recipe, {**values, "network": network})


def describe_changes(before: Recipe, now: Recipe) -> list[str]:
    """The fields in which two recipes differ, as "name before → now"."""
    networks = describe_differences(before.network.to_dict(), now.network.to_dict())
    return networks + describe_differences(recipe_to_dict(before), recipe_to_dict(now))
