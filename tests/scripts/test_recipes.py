"""Recipes from the command line: published ones, users' own, changed by flags; evaluation in processes."""

import json
import sys

import pytest

import train
from networks import HEADS
from tests.scripts.conftest import THIN
from tests.scripts.processes import Processes
from training.recipes import RECIPES, recipe_to_dict
from utils.checkpoint import load_checkpoint

MODULE = """
from dataclasses import replace

from networks import NetworkConfig
from training.recipes import CITYSCAPES

SHORT = replace(CITYSCAPES, network=NetworkConfig(backbone="thin"), num_steps=7, batch_size=3, ohem=False)
NUMBER = 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a user's module into the working folder, which is not where the scripts are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name, text):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def printed(result):
    """The flags that --print-recipe prints, by name."""
    assert result.status == 0, result.error
    assert all(line.startswith("--") for line in result.out.splitlines()), result.out
    return dict(line.split(" ", 1) for line in result.out.splitlines())


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        # ICCV 2019, sections 4.2 and 4.3; TPAMI 2020, section 4.4.
        ("cityscapes", ("19", "769,769", "True", "none", "0.01", "8", "60000", "True")),
        ("ade20k", ("150", "512,512", "False", "300,375,450,525,600", "0.02", "16", "150000", "False")),
        ("lip", ("20", "473,473", "False", "none", "0.007", "40", "114233", "False")),
    ],
)
def test_a_published_recipe_is_printed(call, recipe, published):
    flags = printed(call("train.py", "--recipe", recipe, "--print-recipe"))
    names = ("num_classes", "input_size", "random_scale", "short_sides", "learning_rate", "batch_size")
    names += ("num_steps", "ohem")
    got = tuple(flags["--" + name.replace("_", "-")] for name in names)
    assert got == published
    assert (flags["--backbone"], flags["--recurrence"]) == ("resnet101", "2")
    assert flags["--random-affine"] == str(recipe == "lip")


def test_flags_change_what_is_printed(call):
    options = ("--recipe", "ade20k", "--print-recipe")
    before = printed(call("train.py", *options))
    flags = ("--batch-size", 4, "--backbone", "resnet50", "--ohem", "--short-sides", "10,20")
    after = printed(call("train.py", *options, *flags))
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {
        "--batch-size": "4",
        "--backbone": "resnet50",
        "--ohem": "True",
        "--short-sides": "10,20",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_makes_the_recipe_again(call, name):
    """Given as flags to the default recipe, the printed lines make the other one."""
    result = call("train.py", "--recipe", name, "--print-recipe")
    assert train.parse_args(None, ["--data-dir", "nowhere", *result.out.split()]).recipe == RECIPES[name]


def test_values_that_begin_with_a_minus_are_printed_as_flags(call):
    result = call("train.py", "--mean=-1,2,3", "--print-recipe")
    command = train.parse_args(None, ["--data-dir", "nowhere", *result.out.split()])
    assert command.recipe.network.mean == (-1, 2, 3)


def test_short_sides_can_be_switched_off(call):
    flags = ("--recipe", "ade20k", "--short-sides", "none", "--random-affine")
    after = printed(call("train.py", *flags, "--print-recipe"))
    assert (after["--short-sides"], after["--random-affine"]) == ("none", "True")


def test_the_recipe_of_a_resumed_run_is_printed(call, trained, demo_data):
    options = ("--snapshot-dir", trained.parent, "--resume", "--print-recipe")
    checkpoint = load_checkpoint(trained)
    for more in ((), ("--data-dir", demo_data)):
        result = call("train.py", *options, "--num-steps", 9, *more)
        assert result.status == 0, result.error
        recipe = train.parse_args(None, ["--data-dir", "nowhere", *result.out.split()]).recipe
        assert recipe.network.to_dict() == checkpoint["network"]
        assert recipe_to_dict(recipe) == checkpoint["recipe"] | {"num_steps": 9}


def test_the_recipe_of_a_run_is_printed_with_the_classes_of_its_data(call, demo_data, list_data):
    assert printed(call("train.py", "--recipe", "lip", "--print-recipe"))["--num-classes"] == "20"
    options = ("train.py", "--recipe", "lip", "--print-recipe", "--data-dir")
    assert printed(call(*options, demo_data))["--num-classes"] == "19"
    own = (*options, list_data, "--dataset", "list", "--data-list", list_data / "train.lst")
    assert printed(call(*own, "--num-classes", 3))["--num-classes"] == "3"
    result = call(*options, list_data / "nowhere")
    assert (result.status, result.out) == (1, "")
    assert "nowhere: no such data folder" in result.error


def test_a_recipe_of_ones_own(call, module, demo_data, tmp_path):
    """Found in the working folder, changed by flags, kept by the checkpoint and by the resumed run."""
    module("own_recipes", MODULE)
    flags = printed(call("train.py", "--recipe", "own_recipes:SHORT", "--print-recipe"))
    assert (flags["--num-steps"], flags["--batch-size"], flags["--backbone"]) == ("7", "3", "thin")
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", *THIN[2:])
    result = call("train.py", *options, "--recipe", "own_recipes:SHORT", "--num-steps", 1)
    assert result.status == 0, result.error
    recipe = load_checkpoint(tmp_path / "run" / "CS_scenes_1.pth")["recipe"]
    assert (recipe["batch_size"], recipe["num_steps"], recipe["ohem"]) == (3, 1, False)
    result = call("train.py", *options, "--resume", "--num-steps", 2)  # without --recipe
    assert result.status == 0, result.error
    assert "these settings changed: num_steps 1 → 2\n" in result.out
    recipe = load_checkpoint(tmp_path / "run" / "CS_scenes_2.pth")["recipe"]
    assert (recipe["batch_size"], recipe["num_steps"], recipe["ohem"]) == (3, 2, False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("pascal", f"--recipe pascal: expected one of {', '.join(RECIPES)}, or module:NAME"),
        ("", "--recipe : expected one of cityscapes, "),
        ("no_such_module:A", "no_such_module:A: cannot import no_such_module (ModuleNotFoundError: "),
        ("broken_recipes:A", "(ZeroDivisionError: division by zero, {folder}/broken_recipes.py:1)"),
        ("leaving_recipes:A", "(SystemExit: no data here, {folder}/leaving_recipes.py:2)"),
        ("unwritten_recipes:A", "cannot import unwritten_recipes (SyntaxError: "),
        ("unbounded_recipes:A", "at least 1; got 0, {folder}/unbounded_recipes.py:2)"),
        ("own_recipes:LONG", "expected a Recipe, but own_recipes.LONG does not exist"),
        ("own_recipes:NUMBER", "expected a Recipe, but own_recipes.NUMBER is of type int"),
        ("own_recipes:", "--recipe own_recipes:: expected a Recipe, but own_recipes. does not exist"),
        (":A", "--recipe :A: cannot import "),
    ],
)  # fmt: skip
def test_what_is_no_recipe(call, module, tmp_path, recipe, message):
    module("own_recipes", MODULE)
    module("broken_recipes", "1 / 0\n")
    module("leaving_recipes", "import sys\nsys.exit('no data here')\n")
    module("unwritten_recipes", "A = (\n")
    module("unbounded_recipes", "from training.recipes import Recipe\nA = Recipe(batch_size=0)\n")
    result = call("train.py", "--recipe", recipe, "--print-recipe")
    assert (result.status, result.out) == (2, ""), result
    assert result.error.startswith("train.py: error: ")
    assert message.replace("{folder}", str(tmp_path)) in result.error
    assert result.error.count("\n") == 1, result.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "0"), "argument --batch-size: expected a whole number at least 1, got '0'"),
        (("--aux-weight", "-0.1"), "argument --aux-weight: expected a number at least 0, got '-0.1'"),
        (("--short-sides", "300,0"), "argument --short-sides: expected a whole number at least 1"),
        (("--std", "1,0,1"), "argument --std: expected a number above 0, got '0'"),
        (("--mean", "1,2"), "mean must be 3 values, each a finite number; got (1.0, 2.0)"),
        (("--schedule", "cosinus"), "argument --schedule: invalid choice: 'cosinus'"),
        (("--backbone", "vgg"), "argument --backbone: invalid choice: 'vgg'"),
        (
            ("--model", "plain", "--recurrence", "3"),
            "option of ccnet; model plain has none",
        ),
        (("--accumulate", "3"), "--batch-size 8 cannot be split into 3 parts"),
        (("--random-affine", "--short-sides", "300"), "--random-affine and --short-sides exclude each other"),
    ],
)
def test_values_out_of_bounds(call, demo_data, monkeypatch, arguments, message):
    monkeypatch.setitem(HEADS, "plain", type("Plain", (HEADS["ccnet"],), {"options": ()}))
    result = call("train.py", "--data-dir", demo_data, "--gpu", "cpu", *arguments)
    assert result.status == 2, result
    assert result.error.startswith("train.py: error: ")
    assert message in result.error
    assert result.error.count("\n") == 1, result.error


def test_two_processes_count_what_one_counts(demo_data, trained, tmp_path):
    """Three images, so one process has two of them; tiles, flips and pictures are those of one process."""
    counts = {}
    options = ("--data-dir", demo_data, "--restore-from", trained, "--gpu", "cpu", "--num-workers", 0)
    for count in (1, 2):
        folder = tmp_path / str(count)
        run = Processes(
            folder, "evaluate.py", *options, "--flip", "--save", "--output-dir", folder / "out", count=count
        )
        run.succeed()
        counts[count] = json.loads((folder / "out" / "metrics.json").read_text())
        assert "over 3 images" in run.out()
        assert sorted(path.name for path in (folder / "out" / "ids").iterdir()) == sorted(
            path.name for path in (tmp_path / "1" / "out" / "ids").iterdir()
        )
        for rank in range(1, count):  # only the first process speaks
            assert run.out(rank) == run.error(rank) == ""
    assert sum(map(sum, counts[1]["confusion_matrix"])) > 0
    assert len({sum(row) for row in counts[1]["confusion_matrix"]}) > 1
    for name in counts[1].keys() - {"images_per_second"}:
        assert counts[2][name] == counts[1][name], name
