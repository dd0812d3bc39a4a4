"""The compiled kernels: every instruction set, any number of threads, and binaries that do not fit."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cc_attention
import libs.__main__
from cc_attention import __main__ as checkup
from cc_attention import doctor, reference
from cc_attention.native import KERNELS, Kernels
from cc_attention.ops import implementation

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(KERNELS.why_unusable() is not None, reason=str(KERNELS.why_unusable()))
DOCTORS = [checkup.DOCTOR, libs.__main__.DOCTOR]
both_doctors = pytest.mark.parametrize("one", DOCTORS, ids=lambda one: one.kernels.name)


def run(*command, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if name != KERNELS.variable}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment | variables, capture_output=True, text=True
    )


def test_kernels_are_built_where_there_is_a_compiler():
    if not os.environ.get("CI") and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert KERNELS.why_unusable() is None


@needs_kernels
@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        ("avx2", "C++, AVX2"),
        ("baseline", "C++, baseline"),
        ("none", "PyTorch path (CC_ATTENTION_KERNELS=none)"),
    ],
)
def test_every_implementation_passes_the_operators_tests(kernels, name):
    if implementation("cpu") == name:
        pytest.skip("it serves here: test_ops.py has tested it")
    line = run(
        "-c", "import cc_attention; print(cc_attention.backend())", CC_ATTENTION_KERNELS=kernels
    ).stdout
    if kernels != "avx2" or " avx2 " in Path("/proc/cpuinfo").read_text():
        assert f"CPU: {name};" in line
    tests = Path(__file__).with_name("test_ops.py")
    some = ("-k", "not opcheck and not compile and not export")  # no kernel has a part in these
    result = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *some, str(tests), CC_ATTENTION_KERNELS=kernels
    )
    assert result.returncode == 0, result.stdout


@needs_kernels
@pytest.mark.parametrize("sizes", [(29, 31), (5, 9, 11)])
def test_the_number_of_threads_changes_no_bit(sizes):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, c, *sizes, generator=generator).requires_grad_() for c in (8, 8, 40)]
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
def test_strided_arguments_of_the_backward_pass():
    """Who calls the registered operator may have kept the log-sum-exp or a gradient in another layout."""
    q, k, v, grad = (torch.randn(2, c, 5, 6) for c in (3, 3, 4, 4))
    out, lse = torch.ops.cc_attention.criss_cross_attention(q, k, v)
    backward = torch.ops.cc_attention.criss_cross_attention_backward
    expected = backward(grad, q, k, v, out, lse)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, q, k, v, out, lse)]
    for found, x in zip(backward(*strided), expected, strict=True):
        assert torch.equal(found, x)


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
        (q.unsqueeze(2), k, v),
        (q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2).expand(-1, -1, 2, -1, -1)),
        tuple(x[..., None, None] for x in (q, k, v)),
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
    (package / "cc_attention" / KERNELS.binary.name).unlink(missing_ok=True)
    result = run("-c", SAY, cwd=package)
    assert result.stderr == ""
    assert "CPU: PyTorch path (no compiled kernels; build them with: python setup.py" in result.stdout


def change_sources(package):
    (package / "csrc" / "cpu" / "lines.h").write_text("changed")


def replace_by_text(package):
    (package / KERNELS.binary.name).write_text(f"no library, csrc {KERNELS.source_hash()}")


def replace_by_folder(package):
    (package / KERNELS.binary.name).unlink()
    (package / KERNELS.binary.name).mkdir()


def link_to_cuda(package):
    with (package / KERNELS.binary.name).open("ab") as file:
        file.write(b"libtorch_cuda.so\0")


CPU_BUILD = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is a CUDA build")


@needs_kernels
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change_sources, "was built from other sources"),
        (replace_by_text, "cannot be loaded"),
        (replace_by_folder, "cannot be read (Is a directory); remove it"),
        pytest.param(
            link_to_cuda, "was built with CUDA, and this PyTorch is a CPU build; build", marks=CPU_BUILD
        ),
    ],
)
def test_a_binary_that_does_not_fit_gets_one_line(package, spoil, reason):
    spoil(package / "cc_attention")
    result = run("-c", SAY, cwd=package)
    assert result.returncode == 0
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert "CPU: PyTorch path" in result.stdout
    if reason != "cannot be loaded":  # what the shell scripts ask before anything is loaded
        assert reason in Kernels(package / "cc_attention").why_unusable()


def test_an_unknown_choice_of_kernels_is_named():
    result = run("-c", SAY, CC_ATTENTION_KERNELS="avx1024")
    assert "must be one of avx512, avx2, baseline, none; got 'avx1024'" in result.stdout


@pytest.mark.parametrize("package", ["cc_attention", "libs"])
def test_doctor(package):
    result = run("-m", package)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" right\n") == 4 * (2 if torch.cuda.is_available() else 1)
    if package == "cc_attention":
        assert f"CPU        {implementation('cpu')}" in result.stdout
    assert "to do " in result.stdout


@both_doctors
def test_doctor_refuses_arguments(one, capsys):
    with pytest.raises(SystemExit) as stop:
        one.run(["--foo"])
    assert stop.value.code == 2
    assert f"python -m {one.kernels.name}: error: unrecognized arguments: --foo" in capsys.readouterr().err


def test_doctor_finds_a_wrong_implementation(monkeypatch, capsys):
    def wrong(q, k, v):
        return reference.criss_cross_attention(q, k, 1.01 * v)

    monkeypatch.setattr(checkup, "criss_cross_attention", wrong)
    assert checkup.DOCTOR.run([]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("result", range(4))
def test_doctor_finds_a_result_that_is_nan(result, monkeypatch, capsys):
    results, expected, allowed = checkup.compare("cpu", torch.float32)
    results[result] = results[result] * torch.nan
    one = replace(checkup.DOCTOR, compare=lambda device, dtype: (results, expected, allowed))
    assert one.run([]) == 1
    assert "WRONG" in capsys.readouterr().out


@both_doctors
def test_advice_names_what_would_serve_without_the_variable(one, monkeypatch):
    """The variable is read when the binary is loaded: setting it here changes nothing but the advice."""
    monkeypatch.delenv(one.kernels.variable, raising=False)
    now, advice = one.implementation("cpu"), one.advice()
    monkeypatch.setenv(one.kernels.variable, "baseline")
    assert one.advice() == advice  # the same engine serves without it
    monkeypatch.setattr(doctor.Doctor, "implementation", lambda self, device_type: "C++, baseline")
    assert f"{one.kernels.variable}=baseline is set: without it the CPU has {now}" in one.advice()


def test_cores_where_the_system_does_not_tell_which_may_be_used(monkeypatch):
    assert doctor.available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert doctor.available_cores() == os.cpu_count()
    assert isinstance(checkup.DOCTOR.advice(), list)
