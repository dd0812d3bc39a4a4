"""DESIGN.md's arrows: which room may import which. A room that does not exist is not missed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What every file of a room may import, besides its own room.
ALLOWED: dict[str, set[str]] = {
    "cc_attention": set(),
    "libs": set(),
    "dataset": set(),
    "utils": set(),
    "networks": {"cc_attention", "libs"},
    "training": {"dataset", "utils", "networks.config"},  # a recipe holds the network's settings
    "evaluation": {"dataset", "utils"},
    "instances": {"cc_attention", "networks", "utils"},
}
# What single files may import in addition.
ALSO_ALLOWED = {
    "libs/native.py": {"cc_attention.native"},
    "libs/__main__.py": {"cc_attention.doctor"},
    "networks/config.py": {"utils.fields"},
    "networks/pretrained.py": {"utils.checkpoint", "utils.fields"},
    "evaluation/checkpoint.py": {"networks.mmsegmentation"},
    "evaluation/predictor.py": {"networks"},
    "evaluation/attention_page.py": {"cc_attention"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OURS = {*ALLOWED, *SCRIPTS, "tests", "benchmarks"}
# Packages that these places alone import, and within functions: most users do without them.
OPTIONAL = {"torchvision", "pycocotools", "onnx", "onnxruntime", "onnxscript"}
MAY_IMPORT_OPTIONAL = ("instances/", "export.py")

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (ROOT, *(ROOT / room for room in ALLOWED))
    for path in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
)


def imports(tree):
    """(module, line) of all imports below a node; `from a import b` is a.b, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_within(module, allowed):
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def forbidden(path, source):
    """The imports of a file that the arrows do not allow."""
    room = path.split("/")[0]
    if room in ALLOWED:
        allowed = {room, *ALLOWED[room], *ALSO_ALLOWED.get(path, ())}
    else:
        allowed = set(ALLOWED) - {"instances"}  # a script
    found = [(module, line) for module, line in imports(ast.parse(source)) if is_within(module, OURS)]
    return [f"{path}:{line} imports {module}" for module, line in found if not is_within(module, allowed)]


@pytest.mark.parametrize("path", FILES)
def test_arrows(path):
    assert not forbidden(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES)
def test_optional_packages_are_imported_late_and_in_few_places(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = [module for module, _ in imports(tree) if is_within(module, OPTIONAL)]
    assert not found or path.startswith(MAY_IMPORT_OPTIONAL), f"{path} imports {found}"
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    early = [module for node in statements for module, _ in imports(node) if is_within(module, OPTIONAL)]
    assert not early, f"{path} imports {early} when it is loaded"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("libs/ops.py", "from cc_attention import native"),
        ("cc_attention/ops.py", "import libs.ops"),
        ("training/step.py", "from networks import build_model"),
        ("training/recipes.py", "from networks.registry import build_model"),
        ("networks/config.py", "from utils.checkpoint import load"),
        ("evaluation/inference.py", "import cc_attention"),
        ("utils/checkpoint.py", "def f():\n    from dataset import DATASETS"),
        ("dataset/reading.py", "import train"),
        ("train.py", "from evaluate import main"),
        ("evaluate.py", "import instances.model"),
        ("networks/resnet.py", "from tests.samples import write_pair"),
    ],
)
def test_wrong_arrows_are_found(path, line):
    assert forbidden(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("libs/native.py", "from cc_attention.native import Kernels"),
        ("training/recipes.py", "from networks.config import NetworkConfig"),
        ("training/resumption.py", "from networks.config import NetworkConfig"),
        ("networks/pretrained.py", "from utils.checkpoint import load"),
        ("networks/pretrained.py", "from utils import checkpoint"),
        ("evaluation/predictor.py", "from networks import load_model"),
        ("train.py", "from training.recipes import RECIPES"),
        ("instances/train.py", "from networks.heads import rcca"),
    ],
)
def test_right_arrows_are_let_through(path, line):
    assert not forbidden(path, line)


def test_networks_have_no_device_no_files_and_no_arguments():
    for path in (ROOT / "networks").rglob("*.py"):
        modules = [module for module, _ in imports(ast.parse(path.read_text(encoding="utf-8")))]
        files = set() if path.name == "pretrained.py" else {"os", "pathlib"}
        assert not any(is_within(module, {"argparse"} | files) for module in modules), path
        assert ".cuda(" not in path.read_text(encoding="utf-8"), path
