"""In-Place ABN: its gradients, what it overwrites, and what it refuses."""

import math

import pytest
import torch
from torch import nn

import libs
from libs import ABN, InPlaceABN, ops

ACTIVATIONS = ("leaky_relu", "elu", "identity")
SHAPES = [(3, 5, 7, 9), (2, 5, 1, 1), (1, 5, 3, 4), (4, 5, 11), (6, 5), (2, 5, 2, 3, 4), (2, 37, 19, 23)]


def layers(channels, activation="leaky_relu", affine=True, dtype=torch.float64):
    """ABN and InPlaceABN with the same parameters, some of them negative or tiny."""
    torch.manual_seed(channels)
    pair = [kind(channels, affine=affine, activation=activation) for kind in (ABN, InPlaceABN)]
    if affine:
        pair[0].weight.data = torch.randn(channels).abs().add(0.2) * torch.randn(channels).sign()
        pair[0].bias.data = torch.randn(channels)
    pair[0].running_mean.normal_()
    pair[0].running_var.uniform_(0.5, 2)
    pair[1].load_state_dict(pair[0].state_dict())
    return [layer.to(dtype) for layer in pair]


def results(layer, x, grad):
    """Output and gradients; x * 1 is what the layer may overwrite."""
    x = x.detach().clone().requires_grad_()
    out = layer(x * 1)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad)]


def laid_out(x, channels_last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def drawn(shape, channels_last, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return laid_out(2 * x + 1, channels_last).to(dtype), grad.to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_abn(activation, affine, training, channels_last, shape):
    """ABN is held against the formula in test_abn.py, its gradients against finite differences."""
    plain, inplace = layers(shape[1], activation, affine)
    x, grad = drawn(shape, channels_last)
    expected, actual = (results(layer.train(training), x, grad) for layer in (plain, inplace))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name, value in inplace.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_first_derivatives(activation, training):
    layer = layers(5, activation)[1].train(training)
    x, _ = drawn((2, 5, 3, 4), channels_last=True)
    inputs = (x.requires_grad_(), layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x * 1), inputs)


def transformed(layer):
    """What torch.func and forward-mode differentiation make of a layer: (name, result) of each."""
    generator = torch.Generator().manual_seed(1)
    x, direction, grad = (torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def loss(x):
        return (layer(x * 1) * grad).sum()

    yield "grad", torch.func.grad(loss)(x)
    yield "jvp", torch.func.jvp(lambda x: layer(x * 1), (x,), (direction,))[1]
    yield "jacrev", torch.func.jacrev(loss)(x)
    yield "hessian", torch.func.hessian(loss)(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual * 1)).tangent
    yield "dual", tangent


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transforms_and_forward_mode_are_those_of_abn(training, activation):
    plain, inplace = (layer.train(training) for layer in layers(5, activation))
    for (name, got), (_, want) in zip(transformed(inplace), transformed(plain), strict=True):
        assert want.abs().max() > 0 or name == "hessian"
        torch.testing.assert_close(got, want, msg=name)


def test_second_derivatives_are_refused():
    layer = layers(5)[1]
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    out = layer(x * 1).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives; use ABN"):
        torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_half_types_keep_their_statistics_in_fp32(activation, dtype, channels_last):
    plain, inplace = layers(5, activation)
    x, grad = drawn((3, 5, 17, 19), channels_last, dtype)
    expected = results(plain, x.double(), grad.double())
    inplace.float()
    out, *gradients = results(inplace, x, grad)
    assert out.dtype == gradients[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
    # z is recovered from a rounded y: by the slope 0.01, or by the logarithm near ELU's floor of -0.01.
    eps = torch.finfo(dtype).eps
    for got, want in zip((out, *gradients), expected, strict=True):
        assert (got.double() - want).abs().max() <= (8 if activation == "elu" else 2) * eps * want.abs().max()
    torch.testing.assert_close(inplace.running_var.double(), plain.running_var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_statistics_of_values_far_from_zero(spread):
    noise = torch.randn(2, 3, 300, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (1000.1 + spread * noise).float()
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        mean, var = torch.ops.libs.statistics(layout, None, None, 0.0)[:6].chunk(2)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
        want = x.double().var((0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_variance_of_constants_is_never_negative(channels, channels_last):
    values = torch.logspace(0, 6, 8 * channels).view(8, channels)
    for constants in values:
        x = constants.view(1, -1, 1, 1) * torch.ones(2, channels, 97, 97)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        mean, var = torch.ops.libs.statistics(x, None, None, 0.0)[: 2 * channels].chunk(2)
        assert (var >= 0).all()
        torch.testing.assert_close(mean, constants, rtol=1e-6, atol=0)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.01, 1e-3, 0.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_beside_a_large_bias_in_half_types(weight, activation, dtype):
    """As precise as ABN computed from the same x and grad: the rounding of y is not magnified."""
    plain, inplace = layers(6, activation)
    for layer in (plain, inplace):
        layer.weight.data.copy_(torch.tensor([weight, -weight, 1.0, -2.5, 0.3, weight]))
        layer.bias.data.copy_(torch.tensor([1.0, -1.0, 0.2, 0.0, -0.1, 3.0]))
    x, grad = drawn((4, 6, 31, 33), True, dtype)
    # ELU: x̂ of flat values counts through the mean of dz · x̂. Times 64: no gradient is subnormal in fp16.
    grad = 64 * (grad + 0.3)
    expected, actual = results(plain, x.double(), grad.double()), results(inplace.float(), x, grad)
    allowed = 3 * torch.finfo(dtype).eps
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert relative(got, want) <= allowed
        small = [0, 1, 5] if weight < 0.1 else []
        for channel in [3, *small] if activation == "elu" else small:
            part = (slice(None), channel) if got.dim() > 1 else (slice(channel, channel + 1),)
            if want[part].abs().max() > 1e-4:  # else subnormal in fp16
                assert relative(got[part], want[part]) <= allowed


def test_of_other_channels_nothing_is_saved():
    """Half types save x of those channels alone, and single precision of none."""
    layer = InPlaceABN(6)
    layer.weight.data[2], layer.bias.data[2] = 0.1, -1.0
    for dtype, expected in ((torch.float32, []), (torch.bfloat16, [2 * 1 * 3 * 4])):
        saved = []
        x = torch.randn(2, 6, 3, 4, requires_grad=True).to(dtype) * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = layer(x)
        others = [t.numel() for t in saved if t.data_ptr() != out.data_ptr() and t.is_floating_point()]
        assert [size for size in others if size > 13] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_elu_rounded_to_its_floor_is_inverted_with_the_rounding_of_its_type(dtype, channels_last):
    """Asked of the operators: the layer saves x where this counts."""
    y = torch.full((1, 3, 4, 5), -1.0).to(dtype)
    y = laid_out(y, channels_last)
    grad, statistics = torch.zeros_like(y), torch.tensor([0.0] * 3 + [1.0] * 3 + [20.0])
    sums = torch.tensor([0.0] * 3 + [20.0] * 3)  # dx = -x̂
    dx = torch.ops.libs.gradient(grad, y, statistics, sums, None, None, 0.0, "elu", 1.0)
    floor = math.log(torch.finfo(dtype).eps / 4)
    torch.testing.assert_close(dx.float(), torch.full_like(dx, -floor).float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("weight", [1e-1, 1e-2, 1e-3, 0.0])
def test_small_weights_cost_precision_in_proportion(weight):
    """x̂ comes from (z - bias) / (|weight| + eps): the rounding of z, about eps · |bias|, is divided by it."""
    plain, inplace = layers(5)
    for layer in (plain, inplace):
        layer.weight.data.fill_(weight)
        layer.bias.data.fill_(1.0)
    x, grad = drawn((4, 5, 31, 33), channels_last=True)
    expected, actual = results(plain, x, grad), results(inplace.float(), x.float(), grad.float())
    allowed = 4 * torch.finfo(torch.float32).eps * (10 + 1 / (weight + plain.eps))
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).abs().max() <= allowed * want.abs().max()


def test_the_input_is_overwritten_and_nothing_else_is_saved():
    saved = []
    x = torch.randn(2, 5, 3, 4, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = InPlaceABN(5)(x)
    assert out.data_ptr() == x.data_ptr()
    assert all(t.data_ptr() == out.data_ptr() or t.numel() <= 2 * 5 + 1 for t in saved)


def test_autograd_notices_who_changes_the_output():
    layer, x = InPlaceABN(5), torch.randn(2, 5, 3, 4, requires_grad=True)
    out = layer(x * 1)
    nn.functional.relu_(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autograd_notices_who_wanted_the_input():
    layer, x = InPlaceABN(5), torch.randn(2, 5, 3, 4, requires_grad=True)
    produced = x.exp()  # which saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (layer(produced).sum() + produced.sum()).backward()
    leaf, before = x.detach().clone().requires_grad_(), x.detach().clone()
    with pytest.raises(ValueError, match="must not be a leaf that requires a gradient"):
        layer(leaf)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4, 3, 3), r"InPlaceABN needs \(B,5,…\); got shape \(2, 4, 3, 3\)"),
        (torch.randn(5), r"InPlaceABN needs \(B,5,…\); got shape \(5,\)"),
        (torch.randn(1, 5, 1, 1), "more than one value per channel to train on"),
        (
            torch.randn(2, 5, 6, 6)[:, :, ::2],
            r"must be contiguous or channels-last; got shape \(2, 5, 3, 6\)",
        ),
        (torch.randn(1, 5, 1, 1).expand(2, 5, 3, 3), "must be contiguous or channels-last"),
    ],
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        InPlaceABN(5)(x)


def test_activations_that_cannot_be_inverted():
    with pytest.raises(ValueError, match="activation_param > 0; got 0"):
        InPlaceABN(5, activation_param=0)


def test_an_empty_batch_stays_empty():
    assert InPlaceABN(5).eval()(torch.randn(0, 5, 3, 4)).shape == (0, 5, 3, 4)


@pytest.mark.parametrize("kind", [ABN, InPlaceABN])
def test_frozen_layers_stay_as_they_are_and_pass_exact_gradients(kind):
    layer = kind(5).double()
    layer.running_mean.normal_()
    layer.weight.data.normal_()
    libs.freeze(nn.Sequential(layer))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = layer.eval()(x * 1).detach()
    layer.train()
    assert not layer.training
    torch.testing.assert_close(layer(x * 1), expected)
    assert torch.autograd.gradcheck(lambda x: layer(x * 1), [x])
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
def test_plain_batch_norm_gives_the_same_numbers(activation, affine):
    layer = layers(5, activation, affine)[1]
    plain = libs.to_batch_norm(layer)
    assert not any(isinstance(module, ABN) for module in plain.modules())
    x, grad = drawn((3, 5, 7, 9), channels_last=False)
    for training in (True, False):
        expected, actual = (results(m.train(training), x, grad) for m in (layer, plain))
        torch.testing.assert_close(actual[:2], expected[:2])


def test_plain_batch_norm_of_a_frozen_layer_is_not_trained_either():
    layer = ABN(5)
    layer.freeze()
    assert not any(parameter.requires_grad for parameter in libs.to_batch_norm(layer).parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_folding_into_the_convolution(bias, padding_mode):
    conv = nn.Conv2d(3, 5, 3, 2, 1, bias=bias, padding_mode=padding_mode).double()
    norm = layers(5, "identity")[0].eval()
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(libs.fold(conv, norm)(x), norm(conv(x)))


@pytest.mark.parametrize(
    "step", ["statistics", "merge_statistics", "normalize_relu_", "sums", "sums_add_relu", "gradient"]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck(step, channels_last):
    y, grad = drawn((2, 5, 7, 9), channels_last, torch.float32)
    grad = torch.empty_like(y).copy_(grad)
    vector, statistics, rest = torch.rand(5) + 0.5, torch.rand(11) + 0.5, (1e-5, "leaky_relu", 0.01)
    arguments = {
        "statistics": (y, vector, vector.clone(), 0.1),
        "merge_statistics": (statistics.repeat(3, 1), vector, vector.clone(), 0.1),
        "normalize_relu_": (y, statistics, vector, None, grad, 1e-5),
        "sums": (grad, y, vector, vector, *rest),
        "sums_add_relu": (grad, y, grad, vector, None, 1e-5),
        "gradient": (grad, y, statistics, torch.rand(3, 10), vector, None, *rest),
    }
    # These are steps within an autograd.Function; they have no gradients of their own.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.libs, step), arguments[step], test_utils=tests)


@pytest.mark.parametrize("implementation", ["compiled", "PyTorch"])
def test_a_misspelt_activation_is_refused(implementation):
    normalize = torch.ops.libs.normalize_ if implementation == "compiled" else ops.normalize_
    with pytest.raises((RuntimeError, ValueError), match=r"activation must be .* got leaky_rleu"):
        normalize(torch.rand(2, 5, 3), torch.rand(10), None, None, 1e-5, "leaky_rleu", 0.01)


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_parameter_is_trained_with_fixed_statistics(trained, dtype):
    """The bias is large beside the weight, where half types have to save x."""
    for layer in (pair := [ABN(4), InPlaceABN(4)]):
        layer.eval().requires_grad_(False)
        layer.weight.fill_(1e-2)
        layer.bias.fill_(1.0)
        getattr(layer, trained).requires_grad_()
    x, grad = (torch.randn(3, 4, 5, 5).to(dtype) for _ in range(2))
    expected, found = (
        torch.autograd.grad(
            layer.to(torch.float64 if dtype == torch.float64 else torch.float32)(x * 1),
            getattr(layer, trained),
            grad,
        )[0]
        for layer in pair
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
