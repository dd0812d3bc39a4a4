"""The command line of ``train.py``: a recipe, changes to it, and the run's options."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks.config import NOT_IN_SHAPES, NetworkConfig
from training.options import RunOptions
from training.recipes import RECIPES, Recipe, describe_changes, find_recipe
from training.resumption import Resumed
from utils.arguments import Parser, UsageError, add_flags, flag_of, format_value, take_flags
from utils.fields import setting

DEFAULT_RECIPE = "cityscapes"
NO_DATA = Path(os.devnull)  # in the place of --data-dir, which --print-recipe does not need


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe to begin with."""

    recipe: str = setting(
        DEFAULT_RECIPE,
        f"settings that the other flags change: {', '.join(RECIPES)}, or module:NAME of a file of yours",
        group="recipe",
        metavar="NAME",
    )
    print_recipe: bool = setting(
        False, "print the recipe as flags, as the run would have it, and exit", group="recipe"
    )


@dataclass(frozen=True)
class Command:
    """What the command line says."""

    base: Recipe
    is_named: bool  # by --recipe, which then counts for a resumed run too
    network_changes: dict[str, Any]
    recipe_changes: dict[str, Any]
    options: RunOptions
    print_recipe: bool

    @property
    def recipe(self) -> Recipe:
        """The recipe of a new run."""
        return self.base.with_changes(self.network_changes, self.recipe_changes)

    def recipe_for(self, resumed: Resumed | None, network: Mapping[str, Any]) -> Recipe:
        """The recipe of this run: a resumed run keeps its own, where no flag changes it.

        Args:
            network: fields of NetworkConfig that come from the file which a new run starts from.
        """
        if resumed is None:
            base = self.base
        elif not self.is_named:
            base = resumed.recipe
        else:  # what the run took over from its first weights stays, where the recipe does not say it
            base, before, default = self.base, resumed.recipe.network, NetworkConfig()
            network = {
                name: getattr(before, name)
                for name in NOT_IN_SHAPES
                if getattr(base.network, name) == getattr(default, name)
            }
        return base.with_changes({**network, **self.network_changes}, self.recipe_changes)

    def start_lines(self, start: Path, network: Mapping[str, Any]) -> list[str]:
        """What a new run prints of the file that it starts from and of the settings taken from there.

        Args:
            network: as of ``recipe_for``.
        """
        taken = describe_changes(self.recipe, self.recipe_for(None, network))
        lines = [f"starting from {start}" + ", whose network is taken over" * bool(taken)]
        if taken:
            lines.append(f"settings taken over: {', '.join(taken)}")
        lines += [
            f"{flag_of(name)} {format_value(asked)} contradicts {start}, which has {format_value(has)}"
            for name, has in network.items()
            if (asked := self.network_changes.get(name, has)) != has
        ]
        return lines

    def num_classes(self, resumed: Resumed | None) -> int | None:
        """The number of classes that was asked for; None leaves it to the data set."""
        given = self.network_changes.get("num_classes")
        if given is None and self.options.dataset == "list":
            if self.is_named:
                return self.base.network.num_classes
            if resumed is not None:
                return resumed.recipe.network.num_classes
        return given


def parse_args(description: str | None, argv: list[str] | None = None) -> Command:
    """Read ``argv`` (default: the process's). Mistakes end the process with one line and status 2."""
    first = Parser(None, add_help=False)
    add_flags(first, RecipeOptions)
    wanted = first.parse_known_args(argv)[0]
    name, no_data = wanted.recipe, RunOptions(data_dir=NO_DATA) if wanted.print_recipe else None
    parser = Parser(description)
    try:
        # Before the other flags are made: a recipe's module may add to their choices.
        base = find_recipe(DEFAULT_RECIPE if name is None else name)
        for options, values in (
            (RecipeOptions, None),
            (RunOptions, no_data),
            (NetworkConfig, base.network),
            (Recipe, base),
        ):
            add_flags(parser, options, values, title="network")
        namespace = parser.parse_args(argv)
        command = Command(
            base,
            name is not None,
            take_flags(NetworkConfig, namespace),
            take_flags(Recipe, namespace),
            RunOptions(**{"data_dir": NO_DATA} | take_flags(RunOptions, namespace)),
            bool(namespace.print_recipe),
        )
        if command.options.resume is None:  # otherwise the checkpoint's recipe counts
            command.options.check(command.recipe)
        return command
    except UsageError as error:
        parser.error(str(error))
