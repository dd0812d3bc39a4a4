"""Function transforms and forward-mode derivatives, which a custom operator does not get by itself."""

import pytest
import torch
import torch._dynamo
from torch.autograd import forward_ad

from cc_attention import criss_cross_attention, reference
from tests.cc_attention.definition import inputs

SHAPES = [(1, 2, 3, 3, 4), (1, 2, 2, 2, 2, 3)]


def loss(function, fixed, place):
    """A function of one of query, key and value, and its start."""

    def of(x):
        return function(*fixed[:place], x, *fixed[place + 1 :]).square().sum()

    return of


TRANSFORMS = {
    "grad": torch.func.grad,
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "hessian": torch.func.hessian,
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "jvp": lambda f: (
        lambda x: torch.func.jvp(f, (x,), (torch.linspace(-1, 2, x.numel()).to(x).view_as(x),))[1]
    ),
    "vmap of grad": lambda f: lambda x: torch.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "forward-mode jacobian": lambda f: (
        lambda x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    ),
    "vectorized hessian": lambda f: lambda x: torch.autograd.functional.hessian(f, x, vectorize=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_the_reference(transform, place, shape):
    fixed = inputs(shape)
    expected, actual = (
        TRANSFORMS[transform](loss(function, fixed, place))(fixed[place])
        for function in (reference.criss_cross_attention, criss_cross_attention)
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected)


def test_a_transform_within_a_compiled_function():
    torch._dynamo.reset()
    query, key, value = inputs(SHAPES[0])
    compiled = torch.compile(criss_cross_attention, fullgraph=True, backend="aot_eager")
    compiled(query, key, value)  # without a transform first: its graph must not serve the next call

    def gradient(x):
        return torch.func.grad(loss(criss_cross_attention, [query, key, value], 0))(x)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), gradient(query))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_carry_their_tangent(requires_grad):
    query, key, value = inputs(SHAPES[0], requires_grad=requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        tangent = forward_ad.unpack_dual(criss_cross_attention(query, key, dual)).tangent
    # Weights sum to 1, so values that grow by 1 let the result grow by 1.
    torch.testing.assert_close(tangent, torch.ones_like(value))


def test_a_compiled_function_carries_a_tangent_that_it_was_not_traced_with():
    torch._dynamo.reset()
    query, key, value = inputs(SHAPES[0])
    compiled = torch.compile(criss_cross_attention, fullgraph=True, backend="aot_eager")
    compiled(query, key, value)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        tangent = forward_ad.unpack_dual(compiled(query, key, dual)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(value))


def test_a_gradient_carries_the_tangent_of_what_it_is_given():
    query, key, value = inputs(SHAPES[0], requires_grad=True)
    out = criss_cross_attention(query, key, value)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.zeros_like(out), torch.ones_like(out))
        gradient = torch.autograd.grad(out, query, grad, retain_graph=True)[0]
        tangent = forward_ad.unpack_dual(gradient).tangent
    # The gradient is linear in what it is given.
    torch.testing.assert_close(tangent, torch.autograd.grad(out, query, torch.ones_like(out))[0])


def test_many_gradients_at_once():
    tensors = inputs(SHAPES[0], requires_grad=True)
    out = criss_cross_attention(*tensors)
    grads = torch.stack([torch.ones_like(out), out.detach()])
    together = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        for got, want in zip(
            together, torch.autograd.grad(out, tensors, grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[index], want)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_every_mode(shape):
    assert torch.autograd.gradcheck(
        criss_cross_attention,
        inputs(shape, requires_grad=True),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_plain_calls_do_not_take_the_formula(monkeypatch):
    """It stores the attention; training must not."""
    tensors = inputs(SHAPES[0], requires_grad=True)
    monkeypatch.setattr(reference, "criss_cross_attention", None)
    criss_cross_attention(*tensors).sum().backward()
    with pytest.raises(TypeError):
        torch.func.grad(loss(criss_cross_attention, [x.detach() for x in tensors], 0))(tensors[0].detach())
