"""The paper's cost comparison: run as a user would, its FLOPs counted anew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, claims

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "benchmarks/claims.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def multiply_adds(name, channels, height, width):
    """Of one pass, position by position."""
    reduced, positions = channels // 8, height * width
    convolutions = channels * (reduced + reduced + channels)
    if name == claims.EXPLICIT:
        return positions * (convolutions + positions * (reduced + channels))
    if name == claims.SDPA:  # the energies anew for each of 8 heads
        return positions * (convolutions + positions * (8 * reduced + channels))
    return int(name[-1]) * positions * (convolutions + (height + width) * (reduced + channels))


def test_a_tiny_run_prints_both_tables_and_says_what_holds(tmp_path):
    result = run("--size", "7,5", "--channels", 16, "--rounds", 1, "--json", tmp_path / "claims.json")
    assert result.returncode == 0, result.stderr
    for text in ("1×16×7×5", "16.58  84.7 %", "127  11.11x", "Does not hold: 85 %", "not at the size of"):
        assert text in result.stdout
    written = json.loads((tmp_path / "claims.json").read_text())
    assert written["shape"] == [1, 16, 7, 5]
    assert tuple(written["blocks"]) == claims.NAMES
    for name, row in written["blocks"].items():
        assert row.pop("GFLOP") * 1e9 == pytest.approx(2 * multiply_adds(name, 16, 7, 5))
        assert set(row) == {f"{part} {unit}" for part in ("training", "inference") for unit in ("ms", "MiB")}
        assert all(value > 0 for value in row.values())
    # What every block must hold at its peak: its result, and in training the input's gradient besides.
    map_mib = 16 * 7 * 5 * 4 / 2**20
    for row in written["blocks"].values():
        assert row["inference MiB"] > map_mib
        assert row["training MiB"] > 2 * map_mib


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "0,3"), "'0,3'"),
        (("--size", "97"), "'97'"),
        (("--channels", 12), "got 12"),
        (("--rounds", 0), "got '0'"),
    ],
)
def test_bad_options_are_refused_with_their_value(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        claims.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*claims.CRISS_CROSS, claims.EXPLICIT])
def test_flops_are_those_that_pytorch_counts(name, monkeypatch):
    """PyTorch's counter sees nothing of our kernels: the tensor formulation stands in for them."""
    monkeypatch.setattr("cc_attention.modules.criss_cross_attention", attention.tensor_formulation)
    x = torch.randn(1, 24, 5, 9)
    infer = claims.runs_of(name, x, x)["inference"]
    with FlopCounterMode(display=False) as counter:
        infer()
    assert counter.get_total_flops() == round(1e9 * claims.gflop(name, 24, 5, 9))


def test_flops_at_the_papers_size():
    """Non-local to 0.01 %, criss-cross to 0.3 %: what the paper adds for each round is not known."""
    ours = {name: claims.gflop(name, *claims.PAPER_SHAPE) for name in claims.NAMES}
    for name, value in ours.items():
        assert value * 1e9 == pytest.approx(2 * multiply_adds(name, *claims.PAPER_SHAPE))
    for name, paper in claims.PAPER_GFLOP.items():
        assert ours[name] == pytest.approx(paper, rel=1e-4 if name == claims.EXPLICIT else 3e-3)
    assert round(claims.saved(ours, claims.OURS)) == claims.PAPER_SAVED


def test_blocks_compute_what_their_names_say():
    """Both non-local blocks agree; criss-cross attention on a single row is attention to all."""
    x = torch.randn(1, 16, 1, 9)
    results = []
    for name in ("criss-cross, R=1", claims.EXPLICIT, claims.SDPA):
        torch.manual_seed(0)
        results.append(claims.runs_of(name, x, x)["training"]())
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "Holds"), (0.9, "Does not hold")])
def test_claims_follow_the_numbers(scale, verdict):
    """Explicit non-local at the paper's ratios, then at nine tenths of them."""
    units = [f"{part} {unit}" for part in ("training", "inference") for unit in ("ms", "MiB")]
    results = {name: {unit: 100.0 for unit in ("GFLOP", *units)} for name in claims.NAMES}
    results[claims.EXPLICIT] = {"GFLOP": scale * 650} | {unit: scale * 1100 for unit in units}
    flops, training, inference, any_non_local, time, rounds = claims.claims(results)
    for sentence in (flops, training, inference):
        assert sentence.startswith(verdict + ":")
    assert any_non_local.startswith("Does not hold:") and "1.00 times R=2's" in any_non_local
    assert f"trains {scale * 11:.1f} times" in time
    assert "1.00 times the FLOPs of R=1" in rounds
