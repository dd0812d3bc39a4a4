"""The compiled steps of In-Place ABN: every instruction set, and what their last checks refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from libs import ops
from libs.native import KERNELS

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(KERNELS.why_unusable() is not None, reason=str(KERNELS.why_unusable()))


def test_kernels_are_built_where_there_is_a_compiler():
    if os.environ.get("CI") and KERNELS.variable not in os.environ:
        assert ops.implementation("cpu").startswith("C++")


@needs_kernels
@pytest.mark.parametrize("kernels", ["avx2", "baseline", "none"])
def test_every_implementation(kernels):
    if ops.implementation("cpu") == f"C++, {kernels.upper()}":
        pytest.skip("it serves here: test_inplace.py has tested it")
    tests = str(Path(__file__).with_name("test_inplace.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
        cwd=ROOT, env=os.environ | {"LIBS_KERNELS": kernels}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@needs_kernels
def test_last_line_before_memory():
    """Who calls the registered operators itself passes by the layer's checks, but not by these."""
    x, statistics, vector = torch.rand(2, 4, 3), torch.rand(9), torch.rand(4)
    steps, eps, phi = torch.ops.libs, 1e-5, (1e-5, "identity", 0.0)
    for other in (x[:, :3], x[:1], x.double(), x.transpose(0, 2).contiguous().transpose(0, 2)):
        with pytest.raises(RuntimeError, match="must have the shape, strides and dtype"):
            steps.normalize_relu_(x.clone(), statistics, vector, vector, other, eps)
        with pytest.raises(RuntimeError, match="must have the shape, strides and dtype"):
            steps.sums_add_relu(x, x, other, vector, vector, eps)
        with pytest.raises(RuntimeError, match="must have the shape, strides and dtype"):
            steps.gradient(other, x, statistics, torch.rand(8), vector, vector, *phi)
    for wrong in (vector[:3], torch.rand(5), vector.double()):
        with pytest.raises(RuntimeError, match=r"one (number|float) a channel"):
            steps.normalize_(x.clone(), statistics, wrong, vector, *phi)
    with pytest.raises(RuntimeError, match="one float a channel"):
        steps.normalize_(x.clone(), statistics[:7], vector, vector, *phi)
    for sums in (torch.rand(7), torch.rand(12)):
        with pytest.raises(RuntimeError, match=r"one float a channel|sums must be \(P, 2 C\)"):
            steps.gradient(x, x, statistics, sums, vector, vector, *phi)
