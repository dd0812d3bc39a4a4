"""The options of a script that say which images and labels it works on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA: dict[str, Any] = {"group": "data"}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the samples are; ``utils.arguments.add_flags`` makes a flag of each field."""

    data_dir: Path = field(metadata={**DATA, "help": "folder of the data set"})
    dataset: str | None = field(
        default=None, metadata={**DATA, "help": "the data set's name (default: recognised by its folder)"}
    )
    data_list: Path | None = field(
        default=None,
        metadata={**DATA, "help": "file of 'image label' lines, relative to --data-dir, instead of a split"},
    )
    split: str = field(default="train", metadata={**DATA, "help": "split of the data set"})
