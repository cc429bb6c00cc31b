"""Batch norms fold into the layers before and behind them, or say why not."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.graph import Graph, Value
from planish.passes import fold_batch_norm
from planish.passes.manager import Pipeline

PIPELINE = "fold-batch-norm"


def batch_norm(b: Build, x: Value, channels: int, *, centred: bool = False) -> Value:
    gain, bias, mean = (b.random(channels, name=n) for n in ("gain", "bias", "mean"))
    if centred:
        bias, mean = b.constant(np.zeros(channels)), b.constant(np.zeros(channels))
    variance = b.constant(np.abs(b.rng.normal(size=channels)) + 0.1)
    return b("batch_norm", x, gain, bias, mean, variance, eps=0.01)


def layer(b: Build, kind: str, x: Value, bias: bool, pads: tuple[int, ...] = ()) -> Value:
    """From 6 channels to 6."""
    vector = [b.random(6)] if bias else []
    match kind:
        case "conv":
            return b("conv", x, b.random(6, 6, 3, 3), *vector, pads=pads)
        case "conv-groups":
            return b("conv", x, b.random(6, 2, 3, 3), *vector, groups=3, pads=pads)
        case "conv-depthwise":
            return b("conv", x, b.random(6, 1, 3, 3), *vector, groups=6, strides=(2, 1), pads=pads)
        case "conv-transpose":
            return b("conv_transpose", x, b.random(6, 6, 3, 3), *vector)
        case "conv-transpose-groups":
            return b("conv_transpose", x, b.random(6, 2, 3, 3), *vector, groups=3)
        case "linear":
            return b("linear", x, b.random(6, 6), *vector)
        case "linear-transposed":
            return b("linear", x, b.random(6, 6), *vector, transposed=True)
        case "gemm":
            return b("gemm", x, b.random(6, 6), *vector, alpha=0.5, beta=-2.0)
        case _:
            return b("gemm", x, b.random(6, 6), *vector, trans_b=True, beta=3.0)


KINDS = ["conv", "conv-groups", "conv-depthwise", "conv-transpose", "conv-transpose-groups"] + [
    "linear",
    "linear-transposed",
    "gemm",
    "gemm-transposed",
]


def image(b: Build, kind: str) -> Value:
    return b.input("x", "f32[b, 6, 5, 5]" if "conv" in kind else "f32[b, 6]")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_into_the_layer_before(kind, bias):
    b = Build()
    pads = (1, 1, 1, 1) if kind.startswith("conv-") or kind == "conv" else ()
    y = b("identity", layer(b, kind, image(b, kind), bias, pads))
    after, _ = run(b.output(b("relu", batch_norm(b, y, 6))), PIPELINE)
    assert "batch_norm" not in counts(after)
    assert len(after) == 3


@pytest.mark.parametrize("kind", [k for k in KINDS if "conv-transpose" not in k])
@pytest.mark.parametrize("bias", [False, True])
def test_into_the_layers_behind(kind, bias):
    b = Build()
    x = batch_norm(b, b("relu", image(b, kind)), 6)
    after, _ = run(b.output(layer(b, kind, x, bias), layer(b, kind, x, not bias)), PIPELINE)
    assert "batch_norm" not in counts(after)
    assert len(after) == 3


@pytest.mark.parametrize("kind", ["conv", "conv-transpose-groups"])
def test_a_scale_alone_passes_padding(kind):
    b = Build()
    x = batch_norm(b, b("relu", image(b, kind)), 6, centred=True)
    after, _ = run(b.output(layer(b, kind, x, False, (1, 1, 1, 1))), PIPELINE)
    assert "batch_norm" not in counts(after)


def test_golden(update_golden):
    b = Build()
    x = b.input("x", "f32[b, 2, 5]")
    y = b("conv", x, b.random(2, 2, 3))
    before = b.output(b("relu", batch_norm(b, y, 2)))
    after, _ = run(before, PIPELINE)
    golden("fold-batch-norm", before, after, update_golden)


def test_the_fold_is_rounded_once():
    b = Build()
    after, _ = run(b.output(batch_norm(b, layer(b, "conv", image(b, "conv"), True), 6)), PIPELINE)
    conv = next(after.nodes)
    assert all(v.constant.is_wide and v.dtype == "f32" for v in conv.operands[1:])


def refusal(graph: Graph) -> str:
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert report.applied == []
    (reason,) = reasons(report)
    return reason


def test_a_batch_norm_alone_stays():
    b = Build()
    graph = b.output(batch_norm(b, b("relu", image(b, "conv")), 6))
    assert refusal(graph) == "no layer stands before it"


def test_padding_behind():
    b = Build()
    x = batch_norm(b, b("relu", image(b, "conv")), 6)
    reason = refusal(b.output(layer(b, "conv", x, True, (1, 1, 1, 1))))
    assert reason == (
        "before it: no layer stands before it; behind it: the layer pads with zeros, which a shift does not reach"
    )


def test_automatic_padding_behind():
    b = Build()
    x = batch_norm(b, b("relu", image(b, "conv")), 6)
    graph = b.output(b("conv", x, b.random(6, 6, 3, 3), auto_pad="same_upper"))
    assert "the layer pads with zeros" in refusal(graph)


def test_a_transposed_convolution_behind():
    b = Build()
    x = batch_norm(b, b("relu", image(b, "conv")), 6)
    assert "reaches the border" in refusal(b.output(layer(b, "conv-transpose", x, True)))


def test_another_reader_behind():
    b = Build()
    x = batch_norm(b, b("relu", image(b, "conv")), 6)
    assert "it is read by an op that is no layer" in refusal(b.output(layer(b, "conv", x, True), b("neg", x)))


def test_the_layer_before_read_elsewhere():
    b = Build()
    y = layer(b, "conv", image(b, "conv"), True)
    assert refusal(b.output(batch_norm(b, y, 6), b("neg", y))) == "the layer before it is read elsewhere"


def test_a_tied_weight():
    b = Build()
    w, x = b.random(6, 6, 3, 3), b.input("x", "f32[b, 6, 5, 5]")
    graph = b.output(batch_norm(b, b("conv", x, w), 6), b("conv", b("neg", x), w))
    assert refusal(graph) == "the weight of the layer has other readers"


def test_a_computed_weight():
    b = Build()
    y = b("conv", b.input("x", "f32[b, 6, 5, 5]"), b.input("w", "f32[6, 6, 3, 3]"))
    assert refusal(b.output(batch_norm(b, y, 6))) == "the weight of the layer is no constant"


def test_a_bias_that_is_no_vector():
    b = Build()
    y = b("gemm", b.input("x", "f32[3, 6]"), b.random(6, 6), b.random(3, 6))
    assert refusal(b.output(batch_norm(b, y, 6))) == "the bias of the layer is no constant vector"


def test_channels_on_another_axis():
    b = Build()
    y = b("linear", b.input("x", "f32[b, 6, 4]"), b.random(6, 4))
    assert refusal(b.output(batch_norm(b, y, 6))) == "the channels of the layer are not on axis 1"


def test_computed_statistics():
    b = Build()
    y = layer(b, "conv", image(b, "conv"), True)
    gain = b.input("gain", "f32[6]")
    graph = b.output(b("batch_norm", y, gain, b.random(6), b.random(6), b.constant(np.ones(6))))
    assert refusal(graph) == "its statistics are not constants"


def test_a_variance_that_is_not_positive():
    b = Build()
    y = layer(b, "conv", image(b, "conv"), True)
    variance = b.constant([1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    after, report = Pipeline(PIPELINE).run(
        b.output(b("batch_norm", y, b.random(6), b.random(6), b.random(6), variance)), validate=False
    )
    assert reasons(report[PIPELINE]) == ["its variance plus eps is not positive"]
    assert counts(after) == {"conv": 1, "batch_norm": 1}


@pytest.mark.parametrize("wrong", ["mean", "gain"])
def test_the_validator_rejects_a_wrong_fold(monkeypatch, wrong):
    true = fold_batch_norm.affine

    def affine(node):
        scale, shift = true(node)
        return (scale, shift + 0.001) if wrong == "mean" else (scale * 1.001, shift)

    monkeypatch.setattr(fold_batch_norm, "affine", affine)
    b = Build()
    graph = b.output(batch_norm(b, layer(b, "conv", image(b, "conv"), True), 6))
    with pytest.raises(ValidationError, match="pass 'fold-batch-norm': changed the function"):
        Pipeline(PIPELINE).run(graph)
