"""The CUDA kernels without a GPU: run on an emulator, and compiled for every architecture they are meant for.

The kernel headers in cc_attention/csrc/cuda hold no call to CUDA or PyTorch, so a C++ compiler can build them
on top of cuda_emulator.h, which runs each CUDA thread with a stack of its own. Where the emulator takes
another branch than a GPU (CC_ATTENTION_EMULATED) it is for single instructions: cp.async with its zero fill
and groups, ldmatrix, mma, conversions of half types and TF32. Which addresses, registers and lanes these are
given is code that both run. Copies on sm_75 and older, not asynchronous, are compiled and never run here.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cc_attention import reference
from tests.cuda_compilers import (
    check_sanitized,
    compile_emulated,
    compile_launcher,
    compile_with_nvrtc,
    load_emulated,
    nvcc_architectures,
    run_nvcc,
)

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cc_attention" / "csrc" / "cuda"
TILE = {"portable": 64, "tensor_core": 128, "tensor_float32": 128}
RUNS = [  # engine, dtype
    ("portable", torch.float64),
    ("portable", torch.float32),
    ("portable", torch.float16),
    ("portable", torch.bfloat16),
    ("tensor_core", torch.float16),
    ("tensor_core", torch.bfloat16),
    ("tensor_float32", torch.float32),
]
ONE_OF_EACH = [("portable", torch.float32), *RUNS[-2:]]
# Lines longer than a segment, chunks of channels and their splits.
SMALL = [  # (B, Cr, C, T, H, W), (tile, splits)
    ((2, 3, 5, 1, 3, 4), (64, 1)),  # channels that fill no 16 bytes
    ((2, 16, 24, 1, 3, 5), (2, 1)),  # several segments in each line, the last one shorter
    ((1, 2, 3, 1, 1, 5), (64, 1)),  # columns of one position hold no key
    ((1, 8, 8, 1, 5, 1), (2, 1)),
    ((1, 8, 140, 1, 2, 3), (64, 3)),  # chunks of channels, shared out among blocks
    ((1, 33, 8, 1, 2, 17), (64, 1)),  # more query channels than a step takes, two squares of 16 positions
    ((2, 3, 8, 3, 2, 4), (64, 1)),  # clips
    ((1, 8, 5, 5, 2, 3), (2, 1)),  # an odd number of passes: 2, 1 and 3 segments
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return load_emulated(HERE / "cuda_emulated.cpp", KERNELS, tmp_path_factory)


def maps(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Query, key, value and the gradient of the result, each (B,T,H,W,channels)."""
    batch, reduced, channels, *sizes = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def values(c: int) -> Tensor:
        return torch.randn(batch, *sizes, c, generator=generator, dtype=torch.float64)

    numbers = [scale * values(reduced), scale * values(reduced), values(channels), values(channels)]
    return [x.to(dtype) for x in numbers]


def run(emulated, engine, shape, plan, query, key, value, grad):
    """out, lse, dquery, dkey, dvalue by the kernels; what they do not write stays NaN."""

    def pointers(tensors):
        return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))

    def call(backward, given, results):
        emulated.attention(
            backward,
            engine != "portable",
            str(query.dtype).removeprefix("torch.").encode(),
            (ctypes.c_int * 6)(*shape),
            (ctypes.c_int * 2)(*plan),
            pointers(given),
            pointers(results),
        )

    wide = torch.promote_types(query.dtype, torch.float32)
    out, dquery, dkey, dvalue = (torch.full_like(x, torch.nan) for x in (value, query, key, value))
    lse = torch.full(query.shape[:4], torch.nan, dtype=wide)
    call(0, [query, key, value], [out, lse])
    call(1, [grad, query, key, value, out, lse], [dquery, dkey, dvalue])
    return out, lse, dquery, dkey, dvalue


def by_reference(query, key, value, grad):
    """The same five by the readable formula, in the dtype of its arguments."""
    tensors = [x.movedim(-1, 1).detach().requires_grad_() for x in (query, key, value)]
    out = reference.criss_cross_attention(*tensors)
    gradients = torch.autograd.grad(out, tensors, grad.movedim(-1, 1))
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = energies(query.to(wide), key.to(wide)).logsumexp(dim=-1)
    return out.detach().movedim(1, -1), lse, *(x.movedim(1, -1) for x in gradients)


# Indices of a position, of those along its line through time, column or row, and of the weights.
LINES = [("bthwc", "bshwc", "bthws"), ("bthwc", "btgwc", "bthwg"), ("bthwc", "bthvc", "bthwv")]


def pairs(x, y):
    """Products of x at each position with y along its lines: (B,T,H,W,T+H+W)."""
    return torch.cat([torch.einsum(f"{own},{others}->{w}", x, y) for own, others, w in LINES], dim=-1)


def energies(query, key):
    frames, height, width = query.shape[1:4]
    time = torch.eye(frames, dtype=torch.bool)[:, None, None].expand(-1, height, width, -1)
    column = torch.eye(height, dtype=torch.bool)[:, None].expand(frames, -1, width, -1)
    own = torch.cat([time, column, column.new_zeros(frames, height, width, width)], dim=-1)
    return pairs(query, key).masked_fill(own, -torch.inf)


def tf32(x: Tensor) -> Tensor:
    """To 10 bits of mantissa, to nearest, ties away from zero; in fp64."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def by_formula_in_tf32(query, key, value, grad):
    """The same five with both factors of each product rounded to TF32 and all else in fp64."""
    query, key, value, grad = (tf32(x) for x in (query, key, value, grad))

    def parts(weights):
        return zip(LINES, tf32(weights).split(list(query.shape[1:4]), dim=-1), strict=True)

    def gather(weights, x):
        return sum(torch.einsum(f"{w},{others}->{own}", part, x) for (own, others, w), part in parts(weights))

    def scatter(weights, x):
        return sum(torch.einsum(f"{w},{own}->{others}", part, x) for (own, others, w), part in parts(weights))

    attention = energies(query, key).softmax(dim=-1)
    out = gather(attention, value)
    dattention = pairs(grad, value)
    denergies = attention * (dattention - (grad * out).sum(dim=-1, keepdim=True))
    lse = energies(query, key).logsumexp(dim=-1)
    return out, lse, gather(denergies, key), scatter(denergies, query), scatter(attention, grad)


def check(actual, inputs, engine):
    """No more than twice the error of the formula in the same arithmetic, and a few roundings.

    A gradient of query or key is a sum of P (dP - δ) times a key or query; dP and δ nearly cancel, so their
    own rounding counts: for half types and TF32 that of P, of (dP - δ) P and of the stored result.
    """
    query, key, value, grad = inputs
    exact = by_reference(*(x.double() for x in inputs))
    in_tf32 = engine == "tensor_float32"
    theirs = by_formula_in_tf32(*inputs) if in_tf32 else by_reference(*inputs)
    epsilon = 2**-10 if in_tf32 else torch.finfo(query.dtype).eps  # TF32 has the mantissa of fp16
    largest = [x.double().abs().max().item() if x.numel() else 0.0 for x in (query, key)]
    dattention = (grad.double().norm(dim=-1).amax() * value.double().norm(dim=-1).amax()).item()
    cancelling = [0.0, 0.0, largest[1] * dattention, largest[0] * dattention, 0.0]
    names = ["out", "lse", "dquery", "dkey", "dvalue"]
    for name, got, other, want, terms in zip(names, actual, theirs, exact, cancelling, strict=True):
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs().max()
        share = 8 * torch.finfo(got.dtype).eps  # lse is wider
        if in_tf32 and name != "lse":
            # Both factors are off by up to 2^-11 of themselves. By how much is a matter of luck: weights that
            # are normalised in other steps than the formula's are rounded otherwise.
            share += epsilon
        allowed = 2 * (other.double() - want).abs().max() + share * want.abs().max() + epsilon * terms / 2
        assert error <= allowed, name


@pytest.mark.parametrize(("shape", "plan"), SMALL)
@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_equals_the_formula(emulated, engine, dtype, shape, plan):
    inputs = maps(shape, dtype)
    check(run(emulated, engine, shape, plan, *inputs), inputs, engine)


@pytest.mark.parametrize(
    ("engine", "dtype", "shape"),
    [
        ("portable", torch.float32, (1, 3, 66, 1, 2, 70)),  # two segments of TILE and fewer
        ("tensor_core", torch.bfloat16, (1, 17, 136, 1, 1, 118)),  # every square of a tile
        ("tensor_float32", torch.float32, (1, 12, 132, 1, 118, 1)),
    ],
)
def test_whole_tiles(emulated, engine, dtype, shape):
    inputs = maps(shape, dtype)
    check(run(emulated, engine, shape, (TILE[engine], 1), *inputs), inputs, engine)


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_energies_far_beyond_the_range_of_exp(emulated, engine, dtype):
    """Energies of ±1e4: the softmax is one-hot."""
    shape = (1, 4, 3, 2, 4, 3)
    inputs = maps(shape, dtype, scale=70.0)
    results = run(emulated, engine, shape, (2, 1), *inputs)
    assert all(x.isfinite().all() for x in results)
    check(results, inputs, engine)


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
@pytest.mark.parametrize("frames", [1, 3])
def test_energies_of_minus_infinity(emulated, engine, dtype, frames):
    """They weigh nothing beside finite ones; a position that has no others is NaN, as in the reference."""
    shape = (1, 2, 3, frames, 3, 4)
    query, key, value, grad = maps(shape, dtype)
    query[0, 0, 1, 2] = key[0, 0, 1, 2] = 1
    key[0, -1, 0] = key[0, -1, :, 1] = -torch.inf  # a row and a column
    query[..., 0] = 1  # energies of -inf, not of -inf + inf
    query[..., 1] = 0.5
    results = run(emulated, engine, shape, (2, 1), query, key, value, grad)
    expected = by_reference(query, key, value, grad)
    assert expected[0].isnan().any() == (frames == 1)
    for got, want in zip(results, expected, strict=True):
        want = want.masked_fill(want == -torch.inf, torch.nan)  # lse, where there is no finite energy
        torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize(("engine", "dtype"), ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(1, 0, 3, 1, 3, 2), (1, 3, 0, 2, 3, 2), (2, 1, 1, 1, 1, 1)])
def test_no_channels_and_single_positions(emulated, engine, dtype, shape):
    inputs = maps(shape, dtype)
    check(run(emulated, engine, shape, (2, 1), *inputs), inputs, engine)


@pytest.mark.parametrize(("engine", "dtype"), ONE_OF_EACH)
def test_division_of_work_changes_no_bit(emulated, engine, dtype):
    shape = (2, 4, 136, 2, 1, 3)
    inputs = maps(shape, dtype)
    expected = run(emulated, engine, shape, (2, 1), *inputs)
    actual = run(emulated, engine, shape, (2, 2), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("engine", "dtype"), RUNS[-2:])
def test_inputs_that_begin_anywhere(emulated, engine, dtype):
    """Views may begin at an address that is no multiple of 16 bytes."""
    shape = (1, 8, 8, 2, 2, 3)
    inputs = maps(shape, dtype)
    shifted = []
    for x in inputs:
        memory = x.new_zeros(x.numel() + 1)
        memory[1:] = x.flatten()
        shifted.append(memory[1:].view_as(x))
    expected = run(emulated, engine, shape, (64, 1), *inputs)
    actual = run(emulated, engine, shape, (64, 1), *shifted)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("engine", "room", "shape", "expected"),
    [
        ("tensor_core", 264, (8, 64, 512, 1, 97, 97), (128, 1)),
        ("tensor_core", 264, (1, 64, 512, 1, 97, 97), (128, 2)),  # 97 lines
        ("tensor_core", 264, (1, 64, 512, 1, 20, 9), (128, 4)),  # 512 channels are four chunks
        ("tensor_core", 264, (2, 0, 0, 1, 9, 9), (128, 1)),
        ("portable", 792, (1, 64, 512, 4, 97, 97), (64, 1)),  # two segments in each line
        ("portable", 792, (1, 64, 512, 2, 97, 97), (64, 2)),
    ],
)
def test_division_of_work(emulated, engine, room, shape, expected):
    plan = (ctypes.c_int * 2)()
    emulated.plan_of(engine != "portable", (ctypes.c_int * 6)(*shape), room, plan)
    assert tuple(plan) == expected


SANITIZED = [  # engine on tensor cores or not, dtype, shape, plan
    "0 float32 1 5 12 2 2 5  3 1",
    "0 bfloat16 1 3 65 1 1 3  2 2",
    "1 bfloat16 1 17 136 1 1 2  1 2",  # 16 bytes at a time, several chunks and splits
    "1 float32 1 3 7 1 1 2  1 1",
    "1 float32 1 4 12 1 1 17  64 1",  # two squares of 16 positions
    "1 float16 1 3 7 1 2 3  2 1",
]


@pytest.mark.parametrize(("sanitizer", "runs"), [("address,alignment", SANITIZED), ("thread", SANITIZED[:4])])
def test_sanitizers_find_nothing(tmp_path, sanitizer, runs):
    """Accesses out of bounds or not aligned; missing barriers, which are data races here."""
    flags = ["-O0", "-g1", "-DSTANDALONE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    program = compile_emulated(HERE / "cuda_emulated.cpp", KERNELS, tmp_path / "emulated", *flags)
    for arguments in runs:
        check_sanitized(program, arguments)


# What compilers make of the kernels, with nothing but the headers.
SOURCE = """
#include "backward.cuh"
#include "forward.cuh"
#include "portable.cuh"
#include "tensor_core.cuh"
namespace cc_attention::cuda {
"""
INSTANCE = """
template __global__ void forward_kernel<{engine}, {type}>(ForwardPass<{type}>);
template __global__ void backward_kernel<{engine}, {type}>(BackwardPass<{type}>);
template __global__ void delta_kernel<{type}>(Delta<{type}>);
"""
PORTABLE = [
    ("Portable<double>", "double"),
    ("Portable<float>", "float"),
    ("Portable<float>", "Half"),
    ("Portable<float>", "BFloat16"),
]
TENSOR_CORE = [(f"TensorCore<{x}>", x) for x in ("Half", "BFloat16", "float")]


def source(instances):
    return SOURCE + "".join(INSTANCE.format(engine=e, type=t) for e, t in instances) + "}\n"


@pytest.mark.parametrize("architecture", ["sm_50", "sm_52", "sm_61"])
def test_nvrtc_compiles_for_old_architectures(architecture):
    binary = compile_with_nvrtc(source(PORTABLE), KERNELS, architecture)
    assert binary.startswith(b"\x7fELF")
    assert binary.count(b".text._ZN12cc_attention4cuda14forward_kernel") >= len(PORTABLE)


def test_nvrtc_reports_what_an_old_architecture_lacks():
    """The check itself: atomicAdd on doubles came with sm_60."""
    kernel = '#include "scalar.cuh"\n__global__ void add(double* x) { atomicAdd(x, 1.0); }'
    with pytest.raises(AssertionError, match="atomicAdd"):
        compile_with_nvrtc(kernel, KERNELS, "sm_52")
    compile_with_nvrtc(kernel, KERNELS, "sm_61")


def test_nvcc_compiles_the_operator_for_its_lowest_architecture(tmp_path):
    """The launcher, too, against PyTorch's stable ABI of 2.11."""
    compile_launcher(KERNELS / "attention.cu", tmp_path / "attention.o")


@pytest.mark.parametrize("architecture", [80, 90])
def test_nvcc_compiles_tensor_core_kernels(tmp_path, architecture):
    _, architectures = nvcc_architectures()
    if architecture not in architectures:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    text, binary = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    text.write_text(source(TENSOR_CORE), encoding="utf-8")
    command = [
        "-cubin",
        f"-arch=sm_{architecture}",
        f"-I{KERNELS}",
        "-Xptxas",
        "-v",
        "-o",
        str(binary),
        str(text),
    ]
    printed = run_nvcc(*command)
    kernels = re.findall(
        r"entry function '\S*ward_kernel\S*TensorCore.*?Used (\d+) registers", printed, re.DOTALL
    )
    # Without its body a kernel would compile anywhere; with it each thread holds 64 numbers of the result.
    assert len(kernels) == 2 * len(TENSOR_CORE) and all(int(registers) > 64 for registers in kernels)
