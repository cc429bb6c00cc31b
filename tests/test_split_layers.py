"""split-layers: the parts add up bit for bit, packed and layers agree, ranges are those of the clusters alone."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import check_text
from patterns import golden

import planish
from planish.calibrate.collect import collect
from planish.ir import store
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.probe import random_inputs
from planish.ir.qnodes import qtensor_of
from planish.ir.rewriter import Rewriter
from planish.ir.rounding import quantize_array
from planish.ir.types import TensorType
from planish.passes import split_layers
from planish.passes.kmeans import choose_clusters
from planish.passes.manager import Pipeline
from planish.passes.split_layers import SplitLayers, choose_parts

FORMS = ("packed", "layers")


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Gaussian, a few of them twelve times as large."""
    data = rng.normal(size=shape)
    data.reshape(-1)[:: max(data.size // 7, 1)] *= 12
    return data


def mlp(act: str = "gelu", *, bias: str = "random", transposed: bool = False, hidden: int = 14) -> Graph:
    """x [2, 5, 6] -> linear -> act -> linear."""
    rng = np.random.default_rng(0)
    graph = Graph("mlp")
    x = graph.add_input("x", TensorType("f32", (2, 5, 6)))

    def linear(name: str, x: Value, data: np.ndarray) -> Value:
        n = len(data)
        data = np.ascontiguousarray(data.T if transposed else data)
        operands = [x, graph.add_constant(f"{name}.weight", Constant.of(data.astype(np.float32)))]
        if bias != "none":
            held = rng.normal(size=n) if bias == "random" else np.zeros(n)
            operands.append(graph.add_constant(f"{name}.bias", Constant.of(held.astype(np.float32))))
        return graph.append(get("linear"), operands, {"transposed": True} if transposed else {}, names=[name]).result

    inner = linear("first", x, weights(rng, hidden, 6))
    made = graph.append(get(act), [inner], {}, names=["hidden"]).result
    graph.add_output("y", linear("second", made, weights(rng, 6, hidden)))
    check_text(graph)
    return graph


def convolution(groups: int = 1) -> Graph:
    rng = np.random.default_rng(1)
    graph = Graph("conv")
    x = graph.add_input("x", TensorType("f32", (2, 4, 7, 7)))
    kernel = graph.add_constant("w", Constant.of(weights(rng, 8, 4 // groups, 3, 3).astype(np.float32)))
    bias = graph.add_constant("b", Constant.of(rng.normal(size=8).astype(np.float32)))
    attributes = {"groups": groups, "pads": (1, 1, 1, 1)}
    made = graph.append(get("conv"), [x, kernel, bias], attributes, names=["conv"]).result
    graph.add_output("y", graph.append(get("relu"), [made], {}, names=["y"]).result)
    check_text(graph)
    return graph


def split(graph: Graph, options: str = "", stats: object = None) -> tuple[Graph, object]:
    after, report = Pipeline(f"split-layers{{{options}}}" if options else "split-layers").run(graph, stats=stats)  # type: ignore[arg-type]
    check_text(after)
    done = report["split-layers"]
    assert done.error is not None
    assert done.error <= 1e-10
    return after, done


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["tensor", "row", "g4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_the_weight(form: str, scope: str, transposed: bool) -> None:
    """Supports are disjoint and cover; the sum of the parts is W bit for bit, and the clusters ascend along rows."""
    graph = mlp(transposed=transposed)
    after, done = split(graph, f"form={form} scope={scope}")
    assert done.applied == ["linear %first", "linear %second"]  # type: ignore[attr-defined]
    for name in ("first.weight", "second.weight"):
        value = graph.values[name].constant
        ids = after.values[f"{name}.clusters"].constant
        assert value is not None
        assert ids is not None
        assert ids.dtype == "u2"
        rows, found = value.array(), ids.array().astype(np.uint8)
        if transposed:
            rows, found = rows.T, found.T
        np.testing.assert_array_equal(found, choose_clusters(rows.astype(np.float64), 3, scope))
        nodes = [n for n in after.nodes if n.op.name == "dequantize_split" and n.operands[0].name == name]  # type: ignore[union-attr]
        assert len(nodes) == (1 if form == "packed" else 3)
        parts = [n.op.evaluate(n, [_held(v) for v in n.operands], _wide())[0].numpy() for n in nodes]
        assert sum((p != 0).astype(int) for p in parts).max() == 1
        np.testing.assert_array_equal(sum(parts), value.array())


def _held(value: Value | None) -> torch.Tensor:
    assert value is not None
    assert value.constant is not None
    return _wide().hold(value.constant)


def _wide() -> object:
    from planish.ir.ops.base import Wide

    return Wide()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_per_kernel(form: str, groups: int) -> None:
    graph = convolution(groups)
    after, done = split(graph, f"form={form}")
    assert done.applied == ["conv %conv"]  # type: ignore[attr-defined]
    kernel, ids = graph.values["w"].constant, after.values["w.clusters"].constant
    assert kernel is not None
    assert ids is not None
    rows = kernel.wide().reshape(8, -1)
    np.testing.assert_array_equal(ids.array().astype(np.uint8).reshape(8, -1), choose_clusters(rows, 3, "row"))


def test_defects_of_the_reference_code() -> None:
    """There: a zero bias leaves a layer whole, so do fewer than three outputs; convolutions and GELU fail."""
    for bias in ("zero", "none", "random"):
        after, done = split(mlp(bias=bias), "form=layers")
        assert len(done.applied) == 2  # type: ignore[attr-defined]
        assert sum(n.op.name == "linear" for n in after.nodes) == 6
    narrow, done = split(mlp(hidden=2), "form=layers")
    assert len(done.applied) == 2  # type: ignore[attr-defined]
    assert sum(n.op.name == "linear" for n in narrow.nodes) == 6
    assert split(convolution())[1].applied == ["conv %conv"]  # type: ignore[attr-defined]
    for act in ("gelu", "relu", "silu", "tanh", "sigmoid", "leaky_relu", "elu"):
        after, done = split(mlp(act), "activations=true")
        assert len(done.applied) == 1 + 6  # type: ignore[attr-defined]
        assert [n.attributes for n in after.nodes if n.op.name == act] == [{}] * 3
    graph = mlp("clip")  # ReLU6
    bounds = [graph.add_constant(name, Constant.of(np.float32(v))) for name, v in (("low", 0), ("high", 6))]
    clip = next(n for n in graph.nodes if n.op.name == "clip")
    with Rewriter(graph) as rewriter:
        for port, bound in enumerate(bounds, 1):
            rewriter.set_operand(clip, port, bound)
    after, _ = split(graph, "activations=true")
    assert [n.operands[1:] for n in after.nodes if n.op.name == "clip"] == [
        (after.values["low"], after.values["high"])
    ] * 3
    graph = mlp("leaky_relu")
    for node in graph.nodes:
        if node.op.name == "leaky_relu":
            node.attributes = {"alpha": 0.3}  # arguments of the function are not lost
    after, _ = split(graph, "activations=true")
    assert [n.attributes for n in after.nodes if n.op.name == "leaky_relu"] == [{"alpha": 0.3}] * 3


def test_bias_has_clusters_of_its_own() -> None:
    graph = mlp()
    after, _ = split(graph, "form=layers")
    whole = graph.values["first.bias"].constant
    parts = [after.values[f"first.bias.part{j}"].constant for j in range(3)]
    assert whole is not None
    held = [p.array() for p in parts if p is not None]
    np.testing.assert_array_equal(sum(held), whole.array())
    assert max(sum((p != 0).astype(int) for p in held)) == 1
    nonzero = [p[p != 0] for p in held]
    assert nonzero[0].max() < nonzero[1].min() <= nonzero[1].max() < nonzero[2].min()


def test_choose_parts() -> None:
    assert [p.tolist() for p in choose_parts(None, 7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [p.tolist() for p in choose_parts(None, 2, 3)] == [[0], [1]]
    assert [p.tolist() for p in choose_parts(np.array([1.0, 9, 1.1, 8.8, 90]), 5, 3)] == [[0, 2], [1, 3], [4]]
    assert [p.tolist() for p in choose_parts(np.ones(4), 4, 3)] == [[0, 1, 2, 3]]


def test_activations() -> None:
    """Parts of the channels, by their size where it is known; softmax mixes channels and stays whole."""
    graph = mlp("relu")
    stats = collect(graph, [{k: v.float() for k, v in random_inputs(graph, seed).items()} for seed in range(3)])
    largest = stats.of("hidden").largest
    after, done = split(graph, "activations=true", stats)
    sizes = [v.shape[-1] for v in after.values.values() if v.name.startswith("hidden.part") and v.shape]
    parts = choose_parts(largest, 14, 3)
    assert sizes == [len(p) for p in parts]
    assert done.applied[0].endswith("channels in parts of " + ", ".join(str(len(p)) for p in parts))  # type: ignore[attr-defined]
    _, again = Pipeline("split-layers{activations=true}").run(after)
    assert again["split-layers"].applied == []
    graph = mlp("softmax")
    after, done = split(graph, "activations=true")
    assert done.applied == ["linear %first", "linear %second"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMS)
def test_second_run(form: str) -> None:
    after, _ = split(mlp(), f"form={form}")
    _, report = Pipeline(f"split-layers{{form={form}}}").run(after)
    assert report["split-layers"].applied == []
    folded, _ = Pipeline("fold-constants").run(after)  # does not undo it
    assert folded == after


def test_shared_weights_are_split_once() -> None:
    graph = mlp(hidden=6)
    twice = graph.append(get("linear"), [graph.values["hidden"], graph.values["second.weight"]], names=["twice"])
    graph.add_output("z", twice.result)
    for form, expected in (("packed", 2), ("layers", 6)):
        after, done = split(graph, f"form={form}")
        assert len(done.applied) == 3  # type: ignore[attr-defined]
        assert sum(n.op.name == "dequantize_split" for n in after.nodes) == expected


def test_refusals() -> None:
    def declined(graph: Graph, options: str = "") -> dict[str, list[str]]:
        return split(graph, options)[1].declined  # type: ignore[attr-defined, no-any-return]

    assert declined(mlp(), "skip=^sec") == {"skipped by name": ["linear %second"]}
    graph = mlp()
    graph.add_output("w", graph.append(get("neg"), [graph.values["first.weight"]], {}, names=["w"]).result)
    assert declined(graph) == {"its weight has other readers": ["linear %first"]}
    graph = mlp()
    graph.values["first.weight"].constant = Constant.of(np.full((14, 6), 0.5, np.float32))
    assert declined(graph) == {"its weight holds one value or none": ["linear %first"]}
    bad = np.ones((14, 6), np.float32)
    bad[0, 0] = np.nan
    graph.values["first.weight"].constant = Constant.of(bad)
    with pytest.raises(PlanishError, match=r"weight 'first\.weight': holds NaN or infinity"):
        Pipeline("split-layers").run(graph)
    with pytest.raises(PlanishError, match=r"option 'scope': expected tensor, row or g64 \(any number\); got 'rows'"):
        SplitLayers(scope="rows")
    with pytest.raises(PlanishError, match=r"option 'skip': '\(' is no regular expression"):
        SplitLayers(skip=("(",))
    with pytest.raises(PlanishError, match="option 'clusters': expected an integer from 2 to 4"):
        SplitLayers(clusters=5)


def test_a_lost_element_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: the bias of one part is doubled."""
    parts = split_layers._bias_parts

    def doubled(*args: object) -> list[Value | None]:
        found = parts(*args)  # type: ignore[arg-type]
        return [found[0], found[0], *found[2:]]

    monkeypatch.setattr(split_layers, "_bias_parts", doubled)
    with pytest.raises(ValidationError, match="changed the function"):
        Pipeline("split-layers{form=layers}").run(mlp())


# -- ranges: the trap of methods/a.md 6 -----------------------------------------------------------


def _integers(x: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    """x on 2^bits numbers from low to high."""
    step = (high - low) / (2**bits - 1)
    return np.round((x - low) / step).clip(0, 2**bits - 1) * step + low


def nmse(exact: np.ndarray, rounded: np.ndarray) -> float:
    return float(((exact - rounded) ** 2).sum() / (exact**2).sum())


def trap(bits: int) -> dict[str, float]:
    """The four ways of quantising a Gaussian weight with 0.1 % outliers, 12 times as large; means of four draws."""
    found: dict[str, list[float]] = {"plain": [], "with zeros": [], "unmasked": [], "masked": []}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(256, 384))
        weight[rng.random(weight.shape) < 0.001] *= 12
        ids = choose_clusters(weight, 3, "tensor")
        plain = quantize_array(weight, Format.parse(f"uint{bits}:tensor"))
        found["plain"].append(nmse(weight, plain.dequantize()))
        form = Format.parse(f"uint{bits}:tensor:split3")
        found["masked"].append(nmse(weight, quantize_array(weight, form, clusters=ids).dequantize()))
        zeros, unmasked = np.zeros(weight.shape), np.zeros(weight.shape)
        for j in range(3):
            part, own = np.where(ids == j, weight, 0.0), weight[ids == j]
            zeros += quantize_array(part, Format.parse(f"uint{bits}:tensor")).dequantize()
            unmasked += _integers(part, own.min(), own.max(), bits)  # the padding is rounded too, to no zero
        found["with zeros"].append(nmse(weight, zeros))
        found["unmasked"].append(nmse(weight, unmasked))
    return {name: float(np.mean(values)) for name, values in found.items()}


# NMSE of another draw, measured with other code; "unmasked": the padding is rounded in the range of the cluster
TRAP = {
    2: {"plain": 0.878, "with zeros": 0.807, "masked": 0.289, "unmasked": 0.81},
    3: {"plain": 0.849, "with zeros": 0.693, "masked": 0.259, "unmasked": 0.74},
    4: {"plain": 0.711, "with zeros": 0.212, "masked": 0.118, "unmasked": 0.41},
    8: {"plain": 0.0036, "with zeros": 0.0005, "masked": 0.0005, "unmasked": 0.18},
}


@pytest.mark.parametrize("bits", TRAP)
def test_the_range_of_a_cluster_is_its_own(bits: int) -> None:
    found = trap(bits)
    for name, expected in TRAP[bits].items():
        assert found[name] == pytest.approx(expected, rel=0.2), (name, found)
    if bits < 8:
        assert found["masked"] < 0.75 * found["with zeros"]
    assert found["masked"] < 0.4 * found["plain"]


# -- after quantisation ---------------------------------------------------------------------------


@pytest.mark.parametrize(("clusters", "ids"), [(2, "u1"), (3, "u2")])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_packed_and_layers_agree_after_quantisation(solver: str, clusters: int, ids: str, tmp_path: object) -> None:
    """The same codes and scales; the same outputs here, in ONNX Runtime and in torch, optimiser on and off."""
    graph = mlp()
    stats = collect(graph, [{k: v.float() for k, v in random_inputs(graph, seed).items()} for seed in range(4)])
    x = {k: v.float() for k, v in random_inputs(graph, 3).items()}
    found: dict[str, torch.Tensor] = {}
    held: dict[str, set[tuple[bytes, ...]]] = {}
    for form in FORMS:
        quantised = f"quantize{{weights=uint2:tensor:split{clusters} solver={solver}}}"
        text = f"split-layers{{form={form} clusters={clusters}}},{quantised}"
        after, report = Pipeline(text).run(graph, stats=stats)
        check_text(after)
        assert not report["quantize"].declined
        wide = evaluate(after, x, torch.float64)["y"]
        found[form] = wide
        made = [n for n in after.nodes if n.op.name == "dequantize_split"]
        assert len(made) == (2 if form == "packed" else 2 * clusters)
        assert {n.operands[1].dtype for n in made} == {ids}
        store.save(after, f"{tmp_path}/{form}.ir")
        assert str(store.load(f"{tmp_path}/{form}.ir")) == str(after)
        held[form] = {tuple(v.constant.array().tobytes() for v in n.operands) for n in made}  # type: ignore[union-attr]
        expected = evaluate(after, x)["y"]
        torch.testing.assert_close(planish.to_torch(after)(x["x"]), expected, rtol=1e-4, atol=1e-4)
        for target in ("onnx", "ort"):
            lowered, _ = Pipeline(f"lower{{target={target}}}").run(after)
            path = f"{tmp_path}/{form}.{target}.onnx"
            planish.to_onnx(lowered, path, target=target)
            for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
                options = onnxruntime.SessionOptions()
                options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                (got,) = session.run(None, {k: v.numpy() for k, v in x.items()})
                np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["packed"], found["layers"], rtol=1e-12, atol=1e-12)
    assert held["packed"] == held["layers"]
    assert len(held["packed"]) == 2  # the parts of a weight share their constants


def test_quantised_ranges_are_masked() -> None:
    """What quantize makes of a split weight is what the rounding by clusters makes of its matrix."""
    graph = mlp()
    after, _ = Pipeline("split-layers,quantize{weights=uint2:channel:split3}").run(graph)
    node = next(n for n in after.nodes if n.op.name == "linear")
    q = qtensor_of(node.operands[1])
    weight = graph.values["first.weight"].constant
    assert q is not None
    assert q.clusters is not None
    assert weight is not None
    expected = quantize_array(weight.wide(), Format.parse("uint2:channel:split3"), clusters=q.clusters)
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_allclose(q.dequantize(), expected.dequantize(), rtol=1e-6)
    _, plain = Pipeline("quantize{weights=uint2:channel}").run(graph)
    _, better = Pipeline("split-layers,quantize{weights=uint2:channel:split3}").run(graph)
    signal = [r["quantize"].figures["weights"]["first.weight"]["sqnr_db"] for r in (plain, better)]
    assert signal[1] > signal[0] + 3


@pytest.mark.parametrize("form", FORMS)
def test_quantised_convolutions(form: str, tmp_path: object) -> None:
    """A kernel's clusters have scales per output channel; the file runs in ONNX Runtime."""
    graph = convolution()
    x = {k: v.float() for k, v in random_inputs(graph, 3).items()}
    text = f"split-layers{{form={form}}},quantize{{weights=uint4:channel:split3}}"
    after, report = Pipeline(text).run(graph)
    check_text(after)
    assert report["quantize"].applied == ["conv %conv"] if form == "packed" else len(report["quantize"].applied) == 3
    exact, got = evaluate(graph, x)["y"], evaluate(after, x)["y"]
    plain = evaluate(Pipeline("quantize{weights=uint4:channel}").run(graph)[0], x)["y"]
    assert (got - exact).norm() < 0.5 * (plain - exact).norm()
    path = f"{tmp_path}/conv.onnx"
    planish.to_onnx(after, path, target="onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (ran,) = session.run(None, {"x": x["x"].numpy()})
    np.testing.assert_allclose(ran, got.numpy(), rtol=1e-3, atol=1e-3)


def test_divided_activations_have_ranges_of_their_own() -> None:
    """Static ranges per part: what the small channels lose to the large ones comes back."""
    graph = mlp("relu", hidden=24)
    for name, channels, factor in (("first", (slice(3),), 60.0), ("second", (slice(None), slice(3)), 1 / 60)):
        weight = graph.values[f"{name}.weight"].constant
        assert weight is not None
        data = weight.array().copy()
        data[channels] *= factor  # three loud channels that matter no more than the others
        graph.values[f"{name}.weight"].constant = Constant.of(data)
    stats = collect(graph, [{k: v.float() for k, v in random_inputs(graph, seed).items()} for seed in range(4)])
    x = {k: v.float() for k, v in random_inputs(graph, 9).items()}
    exact = evaluate(graph, x, torch.float64)["y"]
    errors = []
    for text in ("", "split-layers{activations=true},"):
        after, report = Pipeline(f"{text}quantize{{weights=none activations=uint4:tensor:static skip=^first}}").run(
            graph, stats=stats
        )
        names = [name for name in report["quantize"].figures["activations"] if name.startswith("hidden")]
        assert len(names) == (3 if text else 1)
        errors.append(float((evaluate(after, x, torch.float64)["y"] - exact).norm()))
    assert errors[1] < 0.75 * errors[0]


def test_golden(update_golden: bool) -> None:
    graph = mlp(hidden=3)
    after, _ = split(graph, "form=layers")
    golden("split-layers", graph, after, update_golden)
    assert split(graph)[0].values["first.weight.split"].producer is not None
