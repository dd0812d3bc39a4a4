"""The operator within PyTorch: its checks of custom operators, compilation, export, autocast; bad input."""

import pytest
import torch
import torch._dynamo.testing

import cc_attention
from cc_attention import attention_weights, backend, criss_cross_attention
from tests.cc_attention.definition import channels_last, inputs


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (1, 2, 3, 1, 6), (2, 3, 4, 2, 5, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, None])
def test_opcheck(shape, memory_format):
    tensors = inputs(shape, torch.float32, memory_format, requires_grad=True)
    torch.library.opcheck(torch.ops.cc_attention.criss_cross_attention, tuple(tensors))
    plain = [x.detach() for x in tensors]
    out, lse = torch.ops.cc_attention.criss_cross_attention(*plain)
    torch.library.opcheck(
        torch.ops.cc_attention.criss_cross_attention_backward, (torch.randn_like(out), *plain, out, lse)
    )


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 5, 6, 7), (3, 3, 5, 9, 4), (2, 4, 6, 5, 8)],
        [(2, 3, 5, 4, 6, 7), (3, 3, 5, 2, 9, 4), (2, 4, 6, 3, 5, 8)],
    ],
)
def test_compile_in_one_graph_for_any_shape(shapes):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criss_cross_attention, fullgraph=True, dynamic=True, backend=counter)
    for shape in shapes:
        tensors = inputs(shape, torch.float32, requires_grad=True)
        out, expected = compiled(*tensors), criss_cross_attention(*tensors)
        torch.testing.assert_close(out, expected)
        for got, want in zip(
            torch.autograd.grad(out.square().sum(), tensors),
            torch.autograd.grad(expected.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def exported(sizes):
    """The layer as a program whose sizes are left open, and the layer."""
    layer = cc_attention.CrissCrossAttention(16).eval()
    layer.gamma.data.fill_(0.5)
    open_sizes = {2 + i: torch.export.Dim(f"size{i}", min=2) for i in range(len(sizes))}
    return torch.export.export(layer, (torch.randn(1, 16, *sizes),), dynamic_shapes=(open_sizes,)), layer


@pytest.mark.parametrize(("sizes", "others"), [((6, 7), (9, 4)), ((3, 6, 7), (5, 4, 9))])
def test_export_with_sizes_that_are_left_open(sizes, others):
    program, layer = exported(sizes)
    assert "cc_attention.criss_cross_attention" in program.graph_module.code
    x = torch.randn(1, 16, *others)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_onnx_gets_the_formula(monkeypatch):
    """torch.onnx.export traces as torch.export does, while this function says so."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program, layer = exported((6, 7))
    assert "cc_attention" not in program.graph_module.code
    monkeypatch.undo()
    x = torch.randn(1, 16, 9, 4)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_tracing():
    layer = cc_attention.CrissCrossAttention(8)
    layer.gamma.data.fill_(0.5)
    traced = torch.jit.trace(layer, (torch.randn(1, 8, 5, 6),))
    x = torch.randn(2, 8, 7, 4)
    assert torch.equal(traced(x), layer(x))


def test_autocast_leaves_double_precision_alone():
    tensors = inputs((1, 2, 3, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criss_cross_attention(*tensors).dtype == torch.float64


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (2, 3, 5, 4, 7, 9)])
def test_meta_device(shape):
    tensors = [x.to("meta") for x in inputs(shape, torch.float32)]
    out = criss_cross_attention(*tensors)
    assert out.device.type == "meta" and out.shape == tensors[2].shape
    assert out.is_contiguous(memory_format=channels_last(shape))


def test_autocast_casts_to_its_dtype():
    query, key, value = inputs((1, 2, 3, 4, 5), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = criss_cross_attention(query.bfloat16(), key, value)
        expected = criss_cross_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
        assert attention_weights(query, key).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    # Autocast must not reach into the kernel, where it would undo the casts to fp32.
    assert torch.equal(out, criss_cross_attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda q, k, v: (q[0], k, v),
            ValueError,
            r"query must be \(B,C,H,W\) or \(B,C,T,H,W\); got shape \(3, 7, 9\)",
        ),
        (lambda q, k, v: (None, k, v), TypeError, "query must be a tensor; got NoneType"),
        (lambda q, k, v: (q, k.numpy(), v), TypeError, "key must be a tensor; got ndarray"),
        (lambda q, k, v: (q, k, v.tolist()), TypeError, "value must be a tensor; got list"),
        (lambda q, k, v: (q, k, v.to_sparse()), TypeError, "dense tensor; got layout torch.sparse_coo"),
        (lambda q, k, v: (q, k, v + 0j), TypeError, "got torch.complex128"),
        (lambda q, k, v: (q, k, v.unsqueeze(2)), ValueError, r"\(2, 3, 7, 9\) and \(2, 5, 1, 7, 9\)"),
        (lambda q, k, v: (q, k[:, :2], v), ValueError, r"\(2, 3, 7, 9\) and \(2, 2, 7, 9\)"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ValueError, r"\(2, 3, 7, 9\) and \(2, 5, 5, 9\)"),
        (lambda q, k, v: (q, k, v[:1]), ValueError, r"\(1, 5, 7, 9\)"),
        (
            lambda q, k, v: (q, k.float(), v),
            TypeError,
            "key must have the query's dtype torch.float64; got torch.float32",
        ),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "got torch.int32"),
        (
            lambda q, k, v: (q, k, v.to("meta")),
            ValueError,
            "value must be on the query's device cpu; got meta",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        criss_cross_attention(*change(*inputs((2, 3, 5, 7, 9))))


def test_weights_check_their_arguments_too():
    with pytest.raises(TypeError, match="key must be a tensor; got NoneType"):
        attention_weights(torch.ones(1, 1, 2, 2), None)


def test_backend_names_both_devices():
    assert "CPU: " in backend() and "CUDA: " in backend() and "\n" not in backend()
