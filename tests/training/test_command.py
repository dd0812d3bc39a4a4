"""What the command line makes of a recipe where a run is resumed."""

from dataclasses import replace
from pathlib import Path

from networks.config import NetworkConfig
from training.command import Command
from training.options import RunOptions
from training.recipes import CITYSCAPES
from training.resumption import Resumed


def test_a_named_recipe_keeps_its_own_input_on_resumption_and_takes_the_rest_from_the_run():
    named = replace(CITYSCAPES, network=NetworkConfig(channel_order="RGB"))
    before = replace(CITYSCAPES, network=NetworkConfig(head_activation="relu"))
    command = Command(named, True, {}, {}, RunOptions(data_dir=Path("x")), False)
    network = command.recipe_for(Resumed(Path("x_1.pth"), {}, before, ""), {}).network
    assert (network.channel_order, network.head_activation) == ("RGB", "relu")
