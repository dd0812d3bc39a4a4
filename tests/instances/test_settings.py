"""Options, schedule, the attention layer by itself, and what is said without torchvision. Needs none."""

import itertools
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from instances import evaluate, train
from instances.errors import InstancesError, UsageError, require
from instances.model import MaskRCNNConfig, RecurrentCrissCross, RecurrentNonLocal, insert_attention
from instances.options import config_of, parse_args
from instances.pictures import draw_instances
from instances.train import learning_rate
from utils.arguments import run_script
from utils.checkpoint import CheckpointError

LOCAL = Path(__file__).resolve().parents[2] / "instances" / "run_local.sh"


def parse(*options):
    return parse_args(["--data-dir", "coco", *options])


def test_the_default_is_the_published_setting():
    args = parse()
    assert (args.num_steps, args.learning_rate, args.batch_size) == (90000, 0.02, 16)
    assert config_of(args, 91) == MaskRCNNConfig()
    assert (MaskRCNNConfig().backbone, MaskRCNNConfig().recurrence) == ("resnet50", 2)
    quarter = parse("--batch-size", "4")
    assert (quarter.num_steps, quarter.learning_rate) == (360000, 0.005)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("criss_cross", 2, "frozen", 3)),
        (("--attention", "nonlocal"), ("nonlocal", 1, "frozen", 3)),
        (("--recurrence", "0"), ("none", 0, "frozen", 3)),
        (("--attention", "none", "--weights", "none"), ("none", 0, "batch", 5)),
        (("--recurrence", "1", "--norm", "frozen", "--weights", "none"), ("criss_cross", 1, "frozen", 5)),
    ],
)
def test_options_that_follow_from_others(options, expected):
    config = config_of(parse(*options), 91)
    assert (config.attention, config.recurrence, config.norm, config.trainable_layers) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", str(2**31)), "--seed must be below 2147483648; got 2147483648"),
        (("--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--num-steps", "0"), "--num-steps must be above 0; got 0"),
        (("--learning-rate", "nan"), "--learning-rate must be above 0; got nan"),
        (("--gpu", "0,1"), "for several GPUs start instances.train by torchrun"),
        (("--recurrence", "-1"), "recurrence must be at least 0; got -1"),
        (("--attention", "none", "--recurrence", "2"), "recurrence 0 and attention none go together"),
        (("--min-size", "900", "--max-size", "800"), "max_size must be at least min_size 900; got 800"),
        (("--trainable-layers", "6"), "trainable_layers must be at most 5; got 6"),
    ],
)
def test_bad_options_are_told_with_their_value(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        config_of(parse(*options), 91)
    assert caught.value.exit_status == 2


def test_the_rate_warms_up_and_falls_by_steps():
    rates = [learning_rate(0.02, step, 90, 9) for step in range(90)]
    np.testing.assert_allclose(rates[:10], 0.002 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:60], 0.02)
    np.testing.assert_allclose(rates[60:80], 0.002)
    np.testing.assert_allclose(rates[80:], 0.0002)


def lines_attention(layer, x):
    """Criss-cross attention of one round, position by position."""
    query, key, value = layer.query_conv(x), layer.key_conv(x), layer.value_conv(x)
    out = torch.empty_like(value)
    _, _, height, width = x.shape
    for i, j in itertools.product(range(height), range(width)):
        seen = [(i, n) for n in range(width)] + [(m, j) for m in range(height) if m != i]
        keys = torch.stack([key[:, :, m, n] for m, n in seen], dim=2)
        values = torch.stack([value[:, :, m, n] for m, n in seen], dim=2)
        weights = torch.einsum("bc,bcn->bn", query[:, :, i, j], keys).softmax(dim=1)
        out[:, :, i, j] = torch.einsum("bn,bcn->bc", weights, values)
    return x + layer.gamma * out


def every_attention(layer, x):
    """Non-local attention of one round, with all weights written out."""
    query, key, value = (conv(x).flatten(2) for conv in (layer.query_conv, layer.key_conv, layer.value_conv))
    weights = torch.einsum("bci,bcj->bij", query, key).softmax(dim=2)
    return x + layer.gamma * torch.einsum("bij,bcj->bci", weights, value).reshape(x.shape)


@pytest.mark.parametrize("recurrence", [1, 2, 3])
@pytest.mark.parametrize(
    ("make", "one_round"), [(RecurrentCrissCross, lines_attention), (RecurrentNonLocal, every_attention)]
)
def test_attention_is_its_formula_repeated(make, one_round, recurrence):
    torch.manual_seed(0)
    layer = make(16, recurrence).double()
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64)
    assert torch.equal(layer(x), x)  # gamma starts at 0
    nn.init.constant_(layer.gamma, 0.7)
    expected = x
    for _ in range(recurrence):
        expected = one_round(layer, expected)
    torch.testing.assert_close(layer(x), expected)


def test_attention_stands_before_the_last_block_and_names_stay():
    blocks = OrderedDict((str(index), nn.Conv2d(8, 8, 1)) for index in range(6))
    stage = insert_attention(nn.Sequential(blocks), RecurrentCrissCross(8, 2))
    assert list(dict(stage.named_children())) == ["0", "1", "2", "3", "4", "attention", "5"]
    assert all(stage.get_submodule(name) is block for name, block in blocks.items())


def test_instances_are_drawn_where_they_are():
    image = np.full((40, 60, 3), 100, np.uint8)
    masks = [np.zeros((40, 60), np.uint8) for _ in range(3)]
    masks[0][25:35, 10:20] = 1
    masks[1][20:38, 40:58] = 1
    drawn = draw_instances(image, masks, ["", "", "an empty one"])
    changed = (drawn != image).any(axis=2)
    np.testing.assert_array_equal(changed, (masks[0] + masks[1]) > 0)
    assert not np.array_equal(drawn[30, 15], drawn[30, 50])
    assert (image == 100).all()


@pytest.mark.parametrize("package", ["torchvision", "pycocotools.mask"])
def test_a_missing_package_is_told_with_how_to_get_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    with pytest.raises(InstancesError) as caught:
        require(package)
    line = str(caught.value)
    assert line.startswith(f"{package.split('.')[0]} is not installed")
    assert "pip install -r instances/requirements.txt" in line
    assert "\n" not in line


@pytest.mark.parametrize("script", [train, evaluate])
def test_scripts_without_torchvision_say_one_line(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: script.main(script.parse_args(["--data-dir", "x", "--gpu", "cpu"])), "program")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""
    expected = "program: error: torchvision cannot be loaded (operator torchvision::nms does not exist); "
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--x 3: too much"), 2, "program: error: --x 3: too much\n"),
        (CheckpointError("a.pth: gone"), 1, "program: error: a.pth: gone\n"),
        (SystemExit(143), 143, ""),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "program: error: out of memory; use smaller batches, tiles or images\n",
        ),
    ],
)
def test_errors_end_a_script_with_their_status(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main, "program")
    assert ended.value.code == status
    assert capsys.readouterr().err == line


def run_local(*arguments):
    done = subprocess.run(["bash", LOCAL, *arguments], capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines(), done.stdout


def test_run_local_tells_mistakes_before_it_installs_anything():
    assert run_local("--x") == (
        2,
        ["run_local.sh: error: expected the path of a COCO folder, got --x (see --help)"],
        "",
    )
    assert run_local("/nowhere/coco") == (
        1,
        ["run_local.sh: error: /nowhere/coco: no such data folder"],
        "",
    )
    status, (line,), _ = run_local("/tmp", "--resume")
    assert status == 2
    assert line.startswith("run_local.sh: error: --resume is set here; call instances.train yourself")
    status, errors, text = run_local("--help")
    assert (status, errors) == (0, [])
    assert "the published setting on the visible GPUs" in text


def test_operations_of_the_layer_are_counted():
    from instances.costs import attention_flops, count_flops

    layer, x = RecurrentCrissCross(16, 2), torch.randn(1, 16, 5, 3)
    projections = 2 * 15 * 16 * (2 + 2 + 16)
    lines = 2 * 15 * (5 + 3) * (2 + 16)  # energies and sums over H + W entries, the own one in both
    assert count_flops(layer, x) == 2 * (projections + lines)
    assert attention_flops((1, 2, 5, 3), (1, 2, 5, 3), (1, 16, 5, 3)) == lines
