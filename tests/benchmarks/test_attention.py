"""The benchmark runs as its help says; what it times is not tested, what it computes is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention

    return attention


def test_all_formulations_of_one_operator_agree(benchmark):
    torch.manual_seed(0)
    tensors = [torch.randn(2, c, 5, 7) for c in (4, 4, 8)]
    want = benchmark.FORMULATIONS["ours"][0](*tensors)
    for name in ("ours, PyTorch path", "tensor formulation", "einsum formulation"):
        torch.testing.assert_close(benchmark.FORMULATIONS[name][0](*tensors), want)
    explicit, sdpa = (benchmark.FORMULATIONS[f"non-local, {kind}"][0] for kind in ("explicit", "sdpa"))
    torch.testing.assert_close(explicit(*tensors), sdpa(*tensors))


def test_all_formulations_for_clips_agree(benchmark):
    torch.manual_seed(0)
    tensors, grad = [torch.randn(2, c, 3, 5, 4) for c in (4, 4, 8)], torch.randn(2, 8, 3, 5, 4)
    want = benchmark.step(benchmark.CLIP_FORMULATIONS["ours"][0], tensors, grad)
    for function, _ in benchmark.CLIP_FORMULATIONS.values():
        for got, expected in zip(benchmark.step(function, tensors, grad), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_the_pytorch_path_of_the_benchmark_has_the_operators_gradients(benchmark):
    torch.manual_seed(0)
    tensors, grad = [torch.randn(1, c, 5, 7) for c in (4, 4, 8)], torch.randn(1, 8, 5, 7)
    results = [
        benchmark.step(benchmark.FORMULATIONS[name][0], tensors, grad)
        for name in ("ours", "ours, PyTorch path")
    ]
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


def test_on_cuda_events_time_several_calls_that_the_host_launches_ahead(benchmark, monkeypatch):
    """The order in which a GPU would get them."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(self)

        def synchronize(self):
            assert self is queue[-1]

        def elapsed_time(self, end):
            return 2.0 * (queue.index(end) - queue.index(self) - 1)  # of 2 ms each

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    took = benchmark.device_seconds(lambda: queue.append("call"), torch.device("cuda"))
    assert took == pytest.approx(0.002)
    assert queue[0] == "sleep"
    assert queue[2:-1] == ["call"] * benchmark.CALLS


@pytest.mark.parametrize("frames", [0, 2])
def test_runs_and_writes_its_numbers(tmp_path, frames):
    options = [
        "--size",
        "9,11",
        "--channels",
        "16",
        "--reduced",
        "8",
        "--rounds",
        "1",
        "--frames",
        str(frames),
    ]
    result = subprocess.run(
        [sys.executable, "benchmarks/attention.py", *options, "--json", str(tmp_path / "numbers.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "tensor formulation" in result.stdout
    assert "floor at" in result.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    positions = max(frames, 1) * 9 * 11
    met = positions * (frames + 9 + 11)
    assert numbers["ours"]["forward GFLOP"] == pytest.approx(2 * met * (8 + 16) / 1e9)
    assert numbers["floor"]["forward MB"] == pytest.approx(4 * positions * 2 * (8 + 16) / 1e6)
