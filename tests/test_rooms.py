"""The house's plan: which room may import which (scripts → networks → cc_attention, libs; leaves nothing)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"cc_attention", "libs", "networks", "dataset", "utils", "benchmarks", "tests"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED = {
    "cc_attention": {"cc_attention"},
    "libs": {"libs"},
    "dataset": {"dataset"},
    "utils": {"utils"},
    "networks": {"networks", "cc_attention", "libs"},
}


def imported(path):
    """First names of all modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_the_plan_allows(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        ours = set(imported(path)) & (ROOMS | SCRIPTS)
        assert ours <= ALLOWED[room], f"{path} imports {ours - ALLOWED[room]}"


def test_nobody_imports_a_script_or_torchvision():
    for path in [*ROOT.glob("*.py"), *(file for room in ALLOWED for file in (ROOT / room).rglob("*.py"))]:
        assert not set(imported(path)) & (SCRIPTS | {"torchvision", "tests", "benchmarks"}), path


def test_networks_have_no_device_no_files_and_no_arguments():
    for path in (ROOT / "networks").glob("*.py"):
        assert not set(imported(path)) & {"argparse", "os", "pathlib"}, path
        assert ".cuda(" not in path.read_text(), path
