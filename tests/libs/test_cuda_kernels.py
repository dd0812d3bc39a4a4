"""The CUDA kernels without a GPU: run on an emulator, and compiled for every architecture they are meant for.

The kernel headers in libs/csrc/cuda hold no call to CUDA or PyTorch, so a C++ compiler can build them on top
of the operator's emulator, which runs them with one CPU thread for each CUDA thread.
"""

import ctypes
from pathlib import Path

import pytest
import torch

from libs import ops
from libs.functions import activate
from tests.cuda_compilers import (
    check_sanitized,
    compile_emulated,
    compile_launcher,
    compile_with_nvrtc,
    load_emulated,
)

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "libs" / "csrc" / "cuda"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["leaky_relu", "elu", "identity"]
EPS, PARAM, PARTS = 1e-5, 0.01, 3
# (B,C,…), whether channels-last, threads of a block, blocks: what the launcher divides among 256 and 1024.
SMALL = [
    ((2, 16, 7, 5), True, 64, 3),  # several parts, the last one shorter
    ((2, 3, 8, 200), False, 32, 12),
    ((2, 5, 7, 9), True, 32, 1),  # channels that fill no vector
    ((2, 5, 7, 9), False, 32, 12),
    ((3, 40, 2, 2), True, 32, 8),
    ((1, 3, 1, 2), False, 32, 1),
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return load_emulated(HERE / "abn_emulated.cpp", KERNELS, tmp_path_factory)


def call(emulated, case, name, activation, x, given, results):
    """A step of maps like x; vector loads where the launcher would use them."""
    shape, channels_last, threads, blocks = case
    inner = 1 if channels_last else x.numel() // (shape[0] * shape[1])
    sizes = [x.numel() // (shape[1] * inner), shape[1], inner]
    whole = 16 // x.element_size()
    fits = (shape[1] if channels_last else inner) % whole == 0
    aligned = all(t.data_ptr() % 16 == 0 for t in (*given, *results) if t is not None and t.shape == x.shape)
    sizes += [whole if fits and aligned else 1, threads, blocks]

    def pointers(tensors):
        return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))

    emulated.abn_step(
        name.encode(),
        str(x.dtype).removeprefix("torch.").encode(),
        activation.encode(),
        (ctypes.c_int * 6)(*sizes),
        (ctypes.c_double * 3)(EPS, PARAM, PARTS),
        pointers(given),
        pointers(results),
    )
    return results


def laid_out(x, channels_last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def inputs(case, dtype, activation="identity", affine=True):
    """x, grad, y and a dict of vectors, in the dtypes that the operators take."""
    shape, channels_last, *_ = case
    generator = torch.Generator().manual_seed(sum(shape))

    def drawn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    # z between -2 and 2: where ELU has gone flat, z cannot be told from y.
    z = 4 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 2
    y = activate(z, activation, PARAM)
    maps = [laid_out(t.to(dtype), channels_last) for t in (3 * drawn(*shape) + 1, drawn(*shape), y)]
    wide, channels = torch.promote_types(dtype, torch.float32), shape[1]
    vectors = {n: drawn(channels).to(wide) for n in ("weight", "bias", "running_mean", "running_var")}
    count = torch.full((1,), 7.0, dtype=torch.float64)
    vectors["statistics"] = torch.cat((drawn(channels), drawn(channels).abs(), count)).to(wide)
    vectors["sums"] = drawn(PARTS, 2 * channels).to(wide)
    vectors["parts"] = drawn(PARTS, 2 * channels + 1).abs().add(2).to(wide)
    if not affine:
        vectors |= {"weight": None, "bias": None}
    return *maps, vectors


def check(got, theirs, exact, terms=None):
    """No more than twice the error of PyTorch in the same dtype, and some roundings of what is computed with.

    Args:
        terms: where values of both signs are summed, how large these are.
    """
    error, allowed = (got.double() - exact).abs().max(), 2 * (theirs.double() - exact).abs().max()
    wide = torch.promote_types(got.dtype, torch.float32)
    assert error <= allowed + 16 * torch.finfo(wide).eps * (exact if terms is None else terms).abs().max()


def empty_vectors(x, *sizes):
    wide = torch.promote_types(x.dtype, torch.float32)
    return [torch.full((size,), torch.nan, dtype=wide) for size in sizes]


def empty_map(x):
    return torch.full_like(x, torch.nan)


def double(*tensors):
    return [None if t is None else t.clone().double() for t in tensors]


def check_statistics(emulated, case, x, v):
    """Of a batch and of several parts, and what they make of the running statistics."""
    for name, given, terms in (("statistics", x, x.double().abs()), ("merge_statistics", v["parts"], None)):
        operator = getattr(ops, name)
        running = [v["running_mean"], v["running_var"]]
        mine, theirs, exact = (
            double(*running) if wide else [t.clone() for t in running] for wide in (0, 0, 1)
        )
        (got,) = call(
            emulated, case, name, "identity", x, [given], [*empty_vectors(x, 2 * x.shape[1] + 1), *mine]
        )[:1]
        results = operator(given, *theirs, 0.1), operator(given.double(), *exact, 0.1)
        for part in got.tensor_split((x.shape[1], 2 * x.shape[1])):
            begin = part.storage_offset() - got.storage_offset()
            check(part, *(result[begin : begin + len(part)] for result in results), terms)
        for moved, other, want in zip(mine, theirs, exact, strict=True):
            check(moved, other, want, terms)
        (untouched,) = call(emulated, case, name, "identity", x, [given], [got.clone(), None, None])[:1]
        assert torch.equal(untouched, got)


def check_relu(emulated, case, x, grad, z, shortcut, v):
    """Behind the layer: relu(z) and relu(z + shortcut) and their backward passes."""
    statistics, *affine = (v[name] for name in ("statistics", "weight", "bias"))
    for added in (None, shortcut):
        mine, theirs, (exact,) = x.clone(), x.clone(), double(x)
        got = call(
            emulated, case, "normalize_relu_", "", x, [statistics, *affine, added], [mine, empty_map(x)]
        )
        want = ops.normalize_relu_(theirs, statistics, *affine, added, EPS)
        more_exact = ops.normalize_relu_(exact, *double(statistics, *affine, added), EPS)
        check(got[1], want, more_exact)
        check(mine, theirs, exact)
        plain = call(emulated, case, "normalize_", "identity", x, [statistics, *affine], [x.clone(), None])
        assert torch.equal(mine, plain[0])
        total = mine if added is None else mine + added
        assert torch.equal(got[1], total.relu())

    channels = x.shape[1]
    results = [*empty_vectors(x, 2 * channels, channels), empty_map(x)]
    sums, dweight, dz = call(emulated, case, "sums_add_relu", "", x, [grad, z, shortcut, *affine], results)
    assert torch.equal(dz, grad * (z + shortcut > 0))
    given = [dz, z, *affine]
    again = call(emulated, case, "sums", "identity", x, given, empty_vectors(x, 2 * channels, channels))
    terms = ops.sums(*double(grad.abs(), z), None, None, EPS, "identity", 0.0)[0]
    exact = ops.sums(*double(*given), EPS, "identity", 0.0)
    for got, same, want in zip((sums, dweight), again, exact, strict=True):
        check(got, same, want, terms.max() + want.abs())


def check_all_steps(emulated, case, dtype, activation, affine):
    x, grad, y, v = inputs(case, dtype, activation, affine)
    settings, channels = (EPS, activation, PARAM), x.shape[1]
    check_statistics(emulated, case, x, v)
    check_relu(emulated, case, x, grad, y, laid_out(x.flip(0), case[1]), v)

    given = [v["statistics"], v["weight"], v["bias"]]
    out, theirs, (exact,) = x.clone(), x.clone(), double(x)
    call(emulated, case, "normalize_", activation, x, given, [out, None])
    ops.normalize_(theirs, *given, *settings)
    ops.normalize_(exact, *double(*given), *settings)
    check(out, theirs, exact)

    for phi in (activation, "relu"):
        settings = (EPS, phi, PARAM)
        given = [grad, y, v["weight"], v["bias"]]
        got = call(emulated, case, "sums", phi, x, given, empty_vectors(x, 2 * channels, channels))
        theirs, exact = ops.sums(*given, *settings), ops.sums(*double(*given), *settings)
        terms = ops.sums(*double(grad.abs(), y), None, None, *settings)[0]
        for ours, other, want in zip(got, theirs, exact, strict=True):
            check(ours, other, want, terms.max() + want.abs())

        for sums in (v["sums"], None):  # of several parts; none in inference
            given = [grad, y, v["statistics"], sums, v["weight"], v["bias"]]
            (dx, _) = call(emulated, case, "gradient", phi, x, given, [empty_map(y), None])
            check(dx, ops.gradient(*given, *settings), ops.gradient(*double(*given), *settings))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_equals_the_formula(emulated, case, dtype, activation):
    check_all_steps(emulated, case, dtype, activation, affine=case[0][1] % 2 == 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_blocks_of_the_launcher(emulated, activation):
    check_all_steps(emulated, ((1, 40, 5, 13), True, 256, 1024), torch.bfloat16, activation, affine=True)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_with_parameters_and_without(emulated, channels_last, affine):
    check_all_steps(emulated, ((2, 8, 3, 4), channels_last, 32, 4), torch.float32, "leaky_relu", affine)


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (1, 1, 6, 7), (2, 300, 1), (5, 4)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_single_pixels_channels_and_many_of_them(emulated, shape, channels_last):
    check_all_steps(emulated, (shape, channels_last, 32, 2), torch.float16, "elu", affine=True)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_that_begins_anywhere(emulated, channels_last):
    """Views may begin at an address that is no multiple of 16 bytes."""
    case = ((2, 8, 4, 4), channels_last, 32, 4)
    x, grad, y, v = inputs(case, torch.bfloat16)
    shifted = []
    for t in (grad, y):
        memory = t.new_zeros(t.numel() + 1)
        shifted.append(memory[1:].as_strided(t.shape, t.stride()))
        shifted[-1].copy_(t)
    vectors = [v[n] for n in ("statistics", "sums", "weight", "bias")]
    aligned = call(emulated, case, "gradient", "identity", x, [grad, y, *vectors], [empty_map(y), None])
    anywhere = call(emulated, case, "gradient", "identity", x, [*shifted, *vectors], [empty_map(y), None])
    assert torch.equal(anywhere[0], aligned[0])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("outlier", "bound"), [(None, 4e-6), (0.0, 1.5e-5), (1e6, 1.5e-5)])
def test_variance_where_the_mean_is_large(emulated, channels_last, outlier, bound):
    """A thousand standard deviations; also where threads begin with values far off, as zeros of a border are.

    A thread sums up to 128 values, and loses no more than as many roundings.
    """
    case = ((2, 4, 32, 64), channels_last, 32, 1)
    x = torch.randn(case[0], generator=torch.Generator().manual_seed(0)) + 1000
    if outlier is not None:
        x[0, :, 0, :32] = outlier
    x = laid_out(x, channels_last)
    got = call(emulated, case, "statistics", "identity", x, [x], [*empty_vectors(x, 9), None, None])[0]
    exact = ops.statistics(x.double(), None, None, 0.0)
    assert ((got.double() - exact) / exact).abs().max() <= bound


def test_variance_where_the_square_of_the_mean_overflows(emulated):
    case = ((2, 4, 32, 64), False, 32, 1)
    x = 3e19 * (1 + 1e-3 * torch.randn(case[0], generator=torch.Generator().manual_seed(0)))
    got = call(emulated, case, "statistics", "identity", x, [x], [*empty_vectors(x, 9), None, None])[0]
    torch.testing.assert_close(got.double(), ops.statistics(x.double(), None, None, 0.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_elu_has_made_flat(emulated, dtype):
    """There z is not known, but finite: the gradient is what PyTorch's function makes of it."""
    case = ((1, 8, 2, 4), True, 32, 1)
    x, grad, y, v = inputs(case, dtype, "elu")
    y[:, :, 0] = -PARAM
    settings = (EPS, "elu", PARAM)
    given = [grad, y, v["statistics"], v["sums"], v["weight"], v["bias"]]
    dx = call(emulated, case, "gradient", "elu", x, given, [torch.empty_like(y), None])[0]
    assert dx.isfinite().all()
    torch.testing.assert_close(dx, ops.gradient(*given, *settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_types(emulated, dtype):
    """Ties go to even, and a NaN of all ones does not overflow into a number."""
    case = ((1, 2, 8, 8), False, 32, 1)
    ulp = torch.finfo(dtype).eps  # of what is between 1 and 2
    x = (1 + ulp * torch.arange(128).view(1, 2, 8, 8) % 1).to(dtype)
    statistics = torch.tensor([-ulp / 2, torch.nan, 1 - EPS, 1 - EPS])
    statistics.view(torch.int32)[1] = 0x7FFFFFFF
    assert (statistics[2:] + torch.tensor(EPS)).equal(torch.ones(2))  # a factor of exactly 1
    out = call(emulated, case, "normalize_", "identity", x, [statistics, None, None], [x.clone(), None])[0]
    assert torch.equal(out[:, 0], (x[:, 0].float() + ulp / 2).to(dtype))
    assert out[:, 1].isnan().all()


def test_not_a_number_stays_one(emulated):
    case = ((1, 8, 2, 4), False, 32, 1)
    x, *_, v = inputs(case, torch.bfloat16)
    x[0, 3, 1, 1] = torch.nan
    given = [v["statistics"], v["weight"], v["bias"]]
    out = call(emulated, case, "normalize_", "elu", x, given, [x.clone(), None])[0]
    assert torch.equal(out.isnan(), x.isnan())
    for shortcut in (None, torch.zeros_like(x)):
        given = [v["statistics"], v["weight"], v["bias"], shortcut]
        out = call(emulated, case, "normalize_relu_", "", x, given, [x.clone(), empty_map(x)])[1]
        assert torch.equal(out.isnan(), x.isnan())
    statistics = call(emulated, case, "statistics", "elu", x, [x], [*empty_vectors(x, 17), None, None])[0]
    assert statistics.isnan().nonzero().flatten().tolist() == [3, 11]


@pytest.mark.parametrize(
    ("sizes", "vector", "expected"),
    [  # threads side by side and below each other; lines of a part, parts, groups of channels or planes
        ((8 * 97 * 97, 512, 1), 8, (32, 8, 152, 496, 2)),
        ((8 * 385 * 385, 64, 1), 8, (8, 32, 1184, 1002, 1)),
        ((8 * 97 * 97, 2048, 1), 4, (32, 8, 1184, 64, 16)),
        ((8, 512, 97 * 97), 1, (1, 256, 9472, 1, 4096)),
        ((8, 64, 385 * 385), 1, (1, 256, 74240, 2, 512)),
        ((8, 512, 36), 4, (1, 32, 32, 1, 4096)),
        ((1, 512, 1), 8, (32, 8, 8, 1, 2)),
    ],
)
def test_division_of_work(emulated, sizes, vector, expected):
    result = (ctypes.c_longlong * 5)()
    emulated.abn_division((ctypes.c_longlong * 3)(*sizes), vector, result)
    assert tuple(result) == expected


@pytest.mark.parametrize("sanitizer", ["address,alignment", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    """Accesses out of bounds or not aligned; missing barriers, which are data races here."""
    flags = ["-O0", "-g1", "-DSTANDALONE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    program = compile_emulated(HERE / "abn_emulated.cpp", KERNELS, tmp_path / "emulated", *flags)
    for arguments in [
        "bfloat16 leaky_relu  70 24 1  8 64 2",
        "float32 elu  2 3 35  1 32 2",
    ]:
        check_sanitized(program, arguments)


# Kernels of every type, for a compiler that is given nothing but the headers.
SOURCE = """
#include "affine.cuh"
#include "statistics.cuh"
namespace libs::cuda {
"""
INSTANCE = """
template __global__ void statistics_kernel<{T}, {V}>(Division, const {T}*, {W}*);
template __global__ void normalize_kernel<{A}, {T}, {V}>(Division, Maps<{T}>, Channels<{W}>, Parameter<{W}>);
template __global__ void sums_kernel<{A}, {T}, {V}>(Division, Maps<{T}>, Channels<{W}>, Parameter<{W}>, {W}*);
template __global__ void gradient_kernel<{A}, {T}, {V}>(Division, Maps<{T}>, Channels<{W}>, Parameter<{W}>);
"""
JOIN = """
template __global__ void join_statistics_kernel<{W}>(Division, const {W}*, Running<{W}>, {W}*);
template __global__ void merge_statistics_kernel<{W}>(const {W}*, int, int, Running<{W}>, {W}*);
template __global__ void join_sums_kernel<{W}>(Division, const {W}*, Channels<{W}>, {W}*, {W}*);
"""
for kind, wide, elements, phi in [
    ("double", "double", 2, "ELU"),
    ("float", "float", 4, "ADD_RELU"),
    ("Half", "float", 8, "LEAKY_RELU"),
    ("BFloat16", "float", 8, "IDENTITY"),
]:
    SOURCE += INSTANCE.format(T=kind, W=wide, V=elements, A=f"Activation::{phi}")
SOURCE += JOIN.format(W="float") + JOIN.format(W="double") + "}\n"


@pytest.mark.parametrize("architecture", ["sm_50", "sm_52", "sm_61"])
def test_nvrtc_compiles_for_old_architectures(architecture):
    binary = compile_with_nvrtc(SOURCE, KERNELS, architecture)
    assert binary.startswith(b"\x7fELF")
    assert binary.count(b".text._ZN4libs4cuda11sums_kernel") >= 4


def test_nvrtc_reports_what_an_old_architecture_lacks():
    """The check itself: atomicAdd on doubles came with sm_60."""
    kernel = '#include "affine.cuh"\n__global__ void add(double* x) { atomicAdd(x, 1.0); }'
    with pytest.raises(AssertionError, match="atomicAdd"):
        compile_with_nvrtc(kernel, KERNELS, "sm_52")
    compile_with_nvrtc(kernel, KERNELS, "sm_61")


def test_nvcc_compiles_the_operators_for_its_lowest_architecture(tmp_path):
    """The launcher, too, against PyTorch's stable ABI of 2.11."""
    compile_launcher(KERNELS / "abn.cu", tmp_path / "abn.o")
