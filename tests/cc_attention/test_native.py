"""The compiled kernels: every instruction set, any number of threads, and binaries that do not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cc_attention
from cc_attention import __main__ as doctor
from cc_attention import native, reference
from cc_attention.ops import implementation

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def run(*command, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if name != native.VARIABLE}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment | variables, capture_output=True, text=True
    )


def test_kernels_are_built_where_there_is_a_compiler():
    if not os.environ.get("CI") and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert native.problem() is None


@needs_kernels
@pytest.mark.parametrize("kernels", ["avx2", "baseline", "none"])
def test_every_implementation_passes_the_operators_tests(kernels):
    """The one that serves here is tested in this process, and so is what no kernel has a part in."""
    tests = Path(__file__).with_name("test_ops.py")
    some = ("-k", "not opcheck and not compile and not export")
    result = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *some, str(tests), CC_ATTENTION_KERNELS=kernels
    )
    assert result.returncode == 0, result.stdout
    line = run(
        "-c", "import cc_attention; print(cc_attention.backend())", CC_ATTENTION_KERNELS=kernels
    ).stdout
    expected = {
        "avx2": "C++, AVX2",
        "baseline": "C++, baseline",
        "none": "PyTorch path (CC_ATTENTION_KERNELS=none)",
    }
    if kernels != "avx2" or " avx2 " in Path("/proc/cpuinfo").read_text():
        assert f"CPU: {expected[kernels]};" in line


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, c, 29, 31, generator=generator).requires_grad_() for c in (8, 8, 40)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            out = cc_attention.criss_cross_attention(*tensors)
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_kernels
def test_what_comes_back_is_channels_last_in_any_case():
    q, k, v = (torch.randn(2, c, 5, 6) for c in (3, 3, 4))
    out, lse = torch.ops.cc_attention.criss_cross_attention(q, k, v)
    grads = torch.ops.cc_attention.criss_cross_attention_backward(out, q, k, v, out, lse)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (out, *grads))
    weights = torch.cat([torch.einsum("bchw,bcgw->bhwg", q, k), torch.einsum("bchw,bchv->bhwv", q, k)], dim=3)
    own = torch.eye(5, dtype=torch.bool).view(1, 5, 1, 5).expand(2, -1, 6, -1)
    weights[..., :5].masked_fill_(own, float("-inf"))
    torch.testing.assert_close(lse, weights.logsumexp(dim=3))


@needs_kernels
def test_last_line_before_memory():
    """Who calls the registered operator itself passes by Python's checks, but not by these."""
    q, k, v = (torch.randn(1, c, 4, 5) for c in (2, 2, 3))
    operator = torch.ops.cc_attention.criss_cross_attention
    for wrong in (
        (q, k[:, :, :3], v),
        (q, k, v[:, :, :, :2]),
        (q[0], k, v),
        (q, k, v.double()),
        (q[:, :1], k, v),
    ):
        with pytest.raises(RuntimeError, match="do not fit together"):
            operator(*wrong)
    out, lse = operator(q, k, v)
    backward = torch.ops.cc_attention.criss_cross_attention_backward
    for wrong in (
        (out, q, k, v, out, lse[:, 1:]),
        (out[:, 1:], q, k, v, out, lse),
        (out, q, k, v, out, lse.double()),
    ):
        with pytest.raises(RuntimeError, match=r"do not fit together|not those of this forward pass"):
            backward(*wrong)


@pytest.fixture
def package(tmp_path):
    """A copy of the package, with its binary if there is one."""
    shutil.copytree(
        ROOT / "cc_attention", tmp_path / "cc_attention", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


SAY = "import cc_attention; print(cc_attention.backend())"


def test_without_a_binary_all_works_in_silence(package):
    (package / "cc_attention" / native.BINARY.name).unlink(missing_ok=True)
    result = run("-c", SAY, cwd=package)
    assert result.stderr == ""
    assert "CPU: PyTorch path (no compiled kernels; build them with: python setup.py" in result.stdout


@needs_kernels
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "csrc" / "cpu" / "lines.h").write_text("changed"), "was built from other sources"),
        (
            lambda p: (p / native.BINARY.name).write_text(f"no library, csrc {native.source_hash()}"),
            "cannot be loaded",
        ),
    ],
    ids=["stale", "foreign"],
)
def test_a_binary_that_does_not_fit_gets_one_line(package, spoil, reason):
    spoil(package / "cc_attention")
    result = run("-c", SAY, cwd=package)
    assert result.returncode == 0
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert "CPU: PyTorch path" in result.stdout


def test_an_unknown_choice_of_kernels_is_named():
    result = run("-c", SAY, CC_ATTENTION_KERNELS="avx1024")
    assert "must be one of avx512, avx2, baseline, none; got 'avx1024'" in result.stdout


def test_doctor():
    result = run("-m", "cc_attention")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" right\n") == 4 * (2 if torch.cuda.is_available() else 1)
    assert f"CPU        {implementation('cpu')}" in result.stdout
    assert "to do " in result.stdout


def test_doctor_finds_a_wrong_implementation(monkeypatch, capsys):
    def wrong(q, k, v):
        return reference.criss_cross_attention(q, k, 1.01 * v)

    monkeypatch.setattr(doctor, "criss_cross_attention", wrong)
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out
