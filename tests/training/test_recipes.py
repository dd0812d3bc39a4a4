"""Recipes: the published settings, changes by name, what is stored and compared."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dataset import DATASETS, AffineTransform, Normalization, TrainTransform
from networks.config import NetworkConfig
from training.recipes import (
    RECIPES,
    Recipe,
    describe_changes,
    find_recipe,
    format_recipe,
    recipe_from_dict,
    recipe_to_dict,
    transform_of,
)
from training.resumption import from_settings
from utils.arguments import UsageError


def test_the_published_recipe():
    """FACTS of the paper and the reference's README."""
    recipe = RECIPES["cityscapes"]
    assert (recipe.input_size, recipe.batch_size, recipe.num_steps) == ((769, 769), 8, 60000)
    assert (recipe.learning_rate, recipe.power, recipe.momentum, recipe.weight_decay) == (
        1e-2,
        0.9,
        0.9,
        1e-4,
    )
    assert (recipe.ohem, recipe.ohem_thres, recipe.ohem_keep, recipe.aux_weight) == (True, 0.7, 100000, 0.4)
    assert (recipe.network.backbone, recipe.network.recurrence) == ("resnet101", 2)
    assert RECIPES["ade20k"].short_sides == (300, 375, 450, 525, 600)
    fits = {"cityscapes": None, "ade20k": 450, "lip": (473, 473), "camvid": 180}
    assert {name: RECIPES[name].fit for name in fits} == fits
    assert (RECIPES["ade20k"].learning_rate, RECIPES["ade20k"].network.num_classes) == (2e-2, 150)
    lip = RECIPES["lip"]
    assert (lip.input_size, lip.learning_rate, lip.batch_size) == ((473, 473), 7e-3, 40)
    assert lip.num_steps * lip.batch_size / 30462 == pytest.approx(150, abs=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_plain_values(name):
    recipe = RECIPES[name]
    values = recipe_to_dict(recipe)
    assert "network" not in values
    assert recipe_from_dict(values, NetworkConfig.from_dict(recipe.network.to_dict())) == recipe
    assert describe_changes(recipe, recipe) == []


def test_a_recipe_is_printed_as_flags():
    lines = format_recipe(RECIPES["ade20k"]).splitlines()
    assert "--short-sides 300,375,450,525,600" in lines
    assert "--recurrence 2" in lines
    assert len(lines) == len(fields(Recipe)) - 1 + len(fields(NetworkConfig))


def test_changes_are_told_with_both_values():
    before = Recipe()
    now = before.with_changes({"recurrence": 3}, {"batch_size": 4, "amp": "bf16"})
    assert describe_changes(before, now) == ["recurrence 2 → 3", "batch_size 8 → 4", "amp off → bf16"]
    assert before == Recipe()


@pytest.mark.parametrize(
    ("network", "values", "message"),
    [
        ({}, {"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({}, {"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({}, {"criterion": "none"}, "criterion must be one of default; got 'none'"),
        ({}, {"batch_size": 5, "accumulate": 2}, "--batch-size 5 cannot be split into 2 parts"),
        (
            {},
            {"random_affine": True, "short_sides": (5,)},
            "--random-affine and --short-sides exclude each other",
        ),
        (
            {},
            {"random_affine": True, "random_scale": True},
            "--random-affine and --random-scale exclude each other",
        ),
        ({"recurrence": -1}, {}, "recurrence must be at least 0"),
    ],
)
def test_values_out_of_bounds_are_named(network, values, message):
    with pytest.raises(UsageError, match=message):
        Recipe().with_changes(network, values)


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="Recipe has no field colour"):
        recipe_from_dict({"colour": 1}, NetworkConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco", "expected one of cityscapes, ade20k, lip, .*or module:NAME"),
        ("no_such_module:R", r"cannot import no_such_module \(ModuleNotFoundError"),
        ("math:pi", "expected a Recipe, but math.pi is of type float"),
        ("math:tau_recipe", "math.tau_recipe does not exist"),
    ],
)
def test_recipes_that_are_not_there(name, message):
    with pytest.raises(UsageError, match=message):
        find_recipe(name)


def test_the_augmentation_of_each_recipe():
    cityscapes = transform_of(RECIPES["cityscapes"], Normalization(), DATASETS["cityscapes"])
    assert isinstance(cityscapes, TrainTransform)
    assert cityscapes.scale
    ade20k = transform_of(RECIPES["ade20k"], Normalization(), DATASETS["ade20k"])
    assert isinstance(ade20k, TrainTransform)
    assert ade20k.short_sides == (300, 375, 450, 525, 600)
    lip = transform_of(RECIPES["lip"], Normalization(), DATASETS["lip"])
    assert isinstance(lip, AffineTransform)
    assert lip.mirror_pairs == ((14, 15), (16, 17), (18, 19))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("ade20k", {}), ("cityscapes", {"random_scale": False, "short_sides": (300, 600)})],
)
def test_short_sides_scale_without_random_scale(name, changes):
    """The slope of an image that grows by 1 a pixel is the inverse of the factor it was scaled by."""
    recipe = replace(RECIPES[name], input_size=(200, 10), random_mirror=False, **changes)
    transform = transform_of(recipe, Normalization(), DATASETS[name])
    image = np.broadcast_to(np.arange(150, dtype=np.uint8)[:, None, None], (150, 200, 3))
    label, rng = np.zeros((150, 200), np.uint8), np.random.default_rng(0)
    slopes = []
    for _ in range(30):
        column = transform(image, label, rng)[0][0, :, 0]
        slopes.append((column[-1] - column[0]) / 199)
    drawn = {min(recipe.short_sides, key=lambda side: abs(150 / side - slope)) for slope in slopes}
    assert drawn == set(recipe.short_sides)
    assert all(min(abs(150 / side - slope) for side in recipe.short_sides) < 0.02 for slope in slopes)


def test_flat_settings_of_older_checkpoints():
    settings = {
        "model": "ccnet", "backbone": "resnet18", "recurrence": 1, "norm": "auto", "num_classes": 11,
        "input_size": (33, 41), "batch_size": 2, "images": "4 images, abc", "data_dir": "x", "gpu": "cpu",
        "weight_decay": 5e-4, "amp": "off", "accumulate": 1, "split": "train",
    }  # fmt: skip
    recipe, images = from_settings(settings)
    network = NetworkConfig(backbone="resnet18", recurrence=1, num_classes=11)
    assert recipe == replace(Recipe(), network=network, input_size=(33, 41), batch_size=2, weight_decay=5e-4)
    assert images == "4 images, abc"
    with pytest.raises(ValueError, match=r"recurrence must be a whole number; got 2\.5"):
        from_settings(settings | {"recurrence": 2.5})
    with pytest.raises(ValueError, match="input_size"):
        from_settings(settings | {"input_size": 99.5})
