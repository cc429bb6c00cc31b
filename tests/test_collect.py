"""Statistics: what is collected, from which data, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from block_models import WIDTH, Builder, block
from helpers import check_text
from onnx import TensorProto, helper, numpy_helper

import planish
from planish.calibrate.collect import collect, sites
from planish.calibrate.data import load_calibration
from planish.calibrate.tokens import load_tokenizer
from planish.capture.from_onnx import from_onnx
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.passes.manager import Pipeline

Arrays = dict[str, np.ndarray]


def raised(model: object) -> Graph:
    graph, _ = Pipeline("raise").run(from_onnx(model), validate=False)  # type: ignore[arg-type]
    check_text(graph)
    return graph


def data(seed: int, samples: int = 12, tokens: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, tokens, WIDTH)).astype(np.float32)


def cut(x: np.ndarray, size: int) -> list[Arrays]:
    return [{"x": x[i : i + size]} for i in range(0, len(x), size)]


# -- what is collected ---------------------------------------------------------------------------


def test_statistics_are_those_of_the_activations(seed: int) -> None:
    graph, x = raised(block()), data(seed)
    stats = collect(graph, cut(x, 5), rows=1000)
    assert set(stats) == {v.name for v in sites(graph)}
    linears = [n for n in graph.nodes if n.op.name == "linear"]
    assert {n.operands[0].name for n in linears if n.operands[0]} <= set(stats)
    exact = evaluate(graph, {"x": x}, torch.float32, keep=list(stats))
    for name in stats:
        record, rows = stats.of(name), exact[name].reshape(-1, exact[name].shape[-1]).numpy()
        assert record.axis == -1
        assert record.count == len(rows) == 60
        np.testing.assert_allclose(record.minimum, rows.min(0), rtol=1e-5)
        np.testing.assert_allclose(record.maximum, rows.max(0), rtol=1e-5)
        np.testing.assert_allclose(record.mean_square, (rows.astype(np.float64) ** 2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(record.samples, rows, rtol=1e-4, atol=1e-5)


def test_a_convolution_is_collected_by_its_input_channels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 4, 4])],
        [weight],
    )
    captured = from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    x = rng.normal(size=(5, 3, 6, 6)).astype(np.float32)
    stats = collect(captured, [{"x": x}], rows=50)
    record = stats.of("x")
    assert record.axis == -3
    assert record.count == 5 * 36
    assert record.samples.shape == (50, 3)
    np.testing.assert_allclose(record.maximum, x.max(axis=(0, 2, 3)))


def test_the_sample_does_not_depend_on_the_batches(seed: int) -> None:
    graph, x = raised(block()), data(seed, 40)
    one, two = (collect(graph, cut(x, size), rows=37) for size in (40, 3))
    for name in one:
        assert one.of(name).samples.shape[0] == 37
        np.testing.assert_allclose(one.of(name).samples, two.of(name).samples, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.of(name).mean_square, two.of(name).mean_square, rtol=1e-5)


def test_samples_are_spread_over_all_batches(seed: int) -> None:
    graph = raised(block())
    x = np.repeat(np.arange(100.0, dtype=np.float32)[:, None, None], WIDTH, axis=2)
    stats = collect(graph, cut(x, 1), rows=40, values=["x"])
    drawn = stats.of("x").samples[:, 0]
    assert (np.diff(drawn) > 0).all()
    quarters = np.histogram(drawn, 4, (0, 100))[0]
    assert (quarters >= 3).all()


def test_the_seed_changes_the_sample_and_nothing_else(seed: int) -> None:
    graph, x = raised(block()), data(seed, 40)
    one, two = (collect(graph, cut(x, 8), rows=9, values=["x"], seed=s).of("x") for s in (1, 2))
    assert not np.array_equal(one.samples, two.samples)
    np.testing.assert_array_equal(one.mean_square, two.mean_square)


def test_data_is_read_once_and_streamed(seed: int) -> None:
    graph, x = raised(block()), data(seed)
    alive: list[int] = []

    def stream() -> Iterator[Arrays]:
        for index, batch in enumerate(cut(x, 4)):
            alive.append(index)
            yield batch

    assert planish.collect(graph, stream()).source["batches"] == "3"
    assert alive == [0, 1, 2]


def test_save_and_load(tmp_path: Path, seed: int) -> None:
    graph = raised(block())
    stats = collect(graph, cut(data(seed), 4), source="here")
    stats.save(tmp_path / "s.safetensors")
    again = planish.Stats.load(tmp_path / "s.safetensors")
    assert again.source == stats.source
    assert len(again) > 0
    assert set(again) == set(stats)
    for name in stats:
        np.testing.assert_array_equal(again.of(name).samples, stats.of(name).samples)
        assert (again.of(name).count, again.of(name).axis) == (stats.of(name).count, stats.of(name).axis)


# -- rows that count -----------------------------------------------------------------------------


def masked_model() -> object:
    make = Builder()
    out = make.linear(make.norm("x", "norm"), "out")
    model = make.model(out)
    mask = helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "tokens"])
    model.graph.input.append(mask)
    model.graph.node.append(helper.make_node("Cast", ["mask"], ["kept"], to=1))
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["batch", "tokens"]))
    return model


def test_padding_is_no_data(seed: int) -> None:
    graph, x = raised(masked_model()), data(seed, 6, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]] * 2)
    padded = np.where(mask[:, :, None] > 0, x, 1e6).astype(np.float32)
    stats = collect(graph, [{"x": padded, "mask": mask}], row_mask="mask", values=["x", "norm.out"])
    record = stats.of("x")
    assert record.count == mask.sum() == 14
    np.testing.assert_array_equal(record.samples, x[mask > 0])
    assert record.maximum.max() < 10
    # the same tokens padded further: the same statistics
    wider = np.pad(padded, ((0, 0), (0, 3), (0, 0)), constant_values=5e5)
    again = collect(
        graph,
        [{"x": wider[i : i + 1], "mask": np.pad(mask, ((0, 0), (0, 3)))[i : i + 1]} for i in range(6)],
        row_mask="mask",
        values=["x"],
    )
    np.testing.assert_array_equal(again.of("x").samples, record.samples)


def test_a_mask_lies_on_the_axes_with_its_symbols(seed: int) -> None:
    """[batch, heads, tokens, d]: rows of every head count where the token does."""
    model = masked_model()
    make = Builder()
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 2, 4]), "split"))
    model.graph.initializer.append(numpy_helper.from_array(make.rng.normal(size=(4, 4)).astype("f"), "w"))
    model.graph.node.extend(
        [
            helper.make_node("Reshape", ["out.out", "split"], ["parts"]),
            helper.make_node("Transpose", ["parts"], ["heads"], perm=[0, 2, 1, 3]),
            helper.make_node("MatMul", ["heads", "w"], ["mixed"]),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("mixed", TensorProto.FLOAT, ["batch", 2, "tokens", 4]))
    graph, x = raised(model), data(seed, 3, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    stats = collect(graph, [{"x": x, "mask": mask}], row_mask="mask")
    assert stats.of("heads").count == 2 * mask.sum()


def test_what_is_wrong_with_a_row_mask(seed: int) -> None:
    graph, x = raised(masked_model()), data(seed, 2, 3)
    batch = {"x": x, "mask": np.zeros((2, 3), np.int64)}
    with pytest.raises(PlanishError, match="row mask 'msk': not an input of the graph; expected one of x, mask"):
        collect(graph, [batch], row_mask="msk")
    with pytest.raises(PlanishError) as caught:
        collect(graph, [batch], row_mask="mask", values=["x"])
    assert str(caught.value) == "calibration: no row of %x counts\n  hint: 'mask' is zero everywhere"


# -- what is refused -----------------------------------------------------------------------------


def test_activations_that_are_not_finite_are_named(seed: int) -> None:
    graph, x = raised(block()), data(seed, 2)
    x[1, 2, 3] = np.nan
    with pytest.raises(PlanishError) as caught:
        collect(graph, [{"x": x}])
    assert caught.value.what.startswith("activation %")
    assert "holds NaN at row, channel [7, " in caught.value.what


@pytest.mark.parametrize(("number", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_weights_that_are_not_finite_are_named(seed: int, number: float, word: str) -> None:
    make = Builder(seed)
    out = make.linear(make.norm("x", "norm"), "out")
    make.weights["out.weight"][2, 5] = number
    with pytest.raises(PlanishError) as caught:
        collect(raised(make.model(out)), [{"x": data(seed)}])
    assert caught.value.what == (
        f"weight 'out.weight': holds {word} at [2, 5] (1 of 64 elements); expected finite numbers"
    )


def test_no_data_and_wrong_names(seed: int) -> None:
    graph = raised(block())
    with pytest.raises(PlanishError, match="calibration: no data; expected at least one batch"):
        collect(graph, [])
    with pytest.raises(PlanishError, match="input 'y': not an input of the graph; expected x"):
        collect(graph, [{"y": data(seed)}])
    with pytest.raises(PlanishError, match=r"value 'layers\.0\.nrm\.out': not in the graph"):
        collect(graph, [{"x": data(seed)}], values=["layers.0.nrm.out"])
    with pytest.raises(PlanishError, match="calibration: rows is 0; expected at least 1"):
        collect(graph, [{"x": data(seed)}], rows=0)


# -- arrays from files ---------------------------------------------------------------------------


def test_batches_without_names() -> None:
    graph = planish.capture(torch.nn.Linear(3, 2), torch.ones(1, 3))
    x = torch.ones(1, 3)
    for call in (lambda: planish.collect(graph, [x]), lambda: planish.evaluate(graph, x)):
        with pytest.raises(PlanishError) as caught:
            call()
        assert caught.value.what == "inputs: expected a dict of name to tensor, got Tensor"
        assert caught.value.hint == "the inputs of the graph: input"
    for batches, kind in ((x, "Tensor"), ({"input": x}, "dict")):
        with pytest.raises(PlanishError) as caught:
            planish.collect(graph, batches)  # type: ignore[arg-type]
        assert caught.value.what == f"calibration: expected batches, each a dict of name to tensor, got one {kind}"
        assert caught.value.hint == "collect(graph, [batch])"


def test_npz_in_batches(tmp_path: Path, seed: int) -> None:
    graph, x = raised(block()), data(seed, 11)
    np.savez(tmp_path / "d.npz", x=x)
    found = load_calibration(tmp_path / "d.npz", graph, batch=4)
    assert [len(b["x"]) for b in found] == [4, 4, 3]
    assert (len(found), found.samples, found.row_mask) == (3, 11, None)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), x)
    some = load_calibration(tmp_path / "d.npz", graph, batch=4, samples=3)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in some]), x[[0, 3, 7]])


def test_a_folder_of_npz_is_read_in_the_order_of_names(tmp_path: Path, seed: int) -> None:
    graph, x = raised(block()), data(seed, 6)
    for name, part in (("b", x[2:3]), ("a", x[:2]), ("c", x[3:])):
        np.savez(tmp_path / f"{name}.npz", x=part)
    found = load_calibration(tmp_path, graph, batch=2)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), x)
    one = load_calibration(tmp_path, graph, samples=2)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in one]), x[[0, 3]])


def test_samples_with_a_dim_in_front(tmp_path: Path, seed: int) -> None:
    graph, x = raised(block()), data(seed, 6)[:, None]
    np.savez(tmp_path / "d.npz", x=x)
    found = load_calibration(tmp_path / "d.npz", graph)
    assert [b["x"].shape for b in found] == [(1, 5, WIDTH)] * 6


def test_a_static_batch_cuts_the_samples(tmp_path: Path, seed: int) -> None:
    model = block()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 2
    graph = from_onnx(model)
    np.savez(tmp_path / "d.npz", x=data(seed, 6))
    assert [len(b["x"]) for b in load_calibration(tmp_path / "d.npz", graph)] == [2, 2, 2]
    np.savez(tmp_path / "odd.npz", x=data(seed, 5))
    with pytest.raises(PlanishError, match=r"array 'x': wrong shape; expected f32\[2, tokens, 8\] \(or a multiple"):
        load_calibration(tmp_path / "odd.npz", graph)


def test_dtypes_are_converted_where_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    graph = raised(masked_model())
    np.savez(tmp_path / "d.npz", x=data(seed).astype(np.float64), mask=np.ones((12, 5), np.int32))
    (first, *_) = load_calibration(tmp_path / "d.npz", graph)
    assert first["x"].dtype == np.float32
    assert first["mask"].dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((1, 2, 8), "f")}, "array 'y': not an input of the model; expected x, mask"),
        ({"x": np.zeros((1, 2, 8), "f")}, "input 'mask' is missing; got x"),
        (
            {"x": np.zeros((1, 2, 7), "f"), "mask": np.ones((1, 2), np.int64)},
            "array 'x': wrong shape; expected f32[?, tokens, 8], got [1, 2, 7]",
        ),
        (
            {"x": np.zeros((2, 8), "f"), "mask": np.ones((1, 2), np.int64)},
            "array 'x': wrong shape; expected f32[?, tokens, 8], got [2, 8]",
        ),
        (
            {"x": np.zeros((1, 2, 8), "f"), "mask": np.ones((1, 2), "f")},
            "array 'mask': wrong dtype; expected i64, got f32",
        ),
        (
            {"x": np.zeros((1, 2, 8), int), "mask": np.ones((1, 2), int)},
            "array 'x': wrong dtype; expected f32, got i64",
        ),
        (
            {"x": np.zeros((3, 2, 8), "f"), "mask": np.ones((1, 2), np.int64)},
            "arrays hold different numbers of samples: 'x' 3, 'mask' 1",
        ),
        ({"x": np.zeros((0, 2, 8), "f"), "mask": np.ones((0, 2), np.int64)}, "holds no samples"),
    ],
)
def test_what_is_wrong_with_arrays(tmp_path: Path, arrays: Arrays, message: str) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(PlanishError) as caught:
        load_calibration(path, raised(masked_model()))
    assert caught.value.what == f"{path}: {message}"


def test_what_is_wrong_with_files(tmp_path: Path) -> None:
    graph = raised(block())

    def message(path: Path, **options: object) -> str:
        with pytest.raises(PlanishError) as caught:
            load_calibration(path, graph, **options)  # type: ignore[arg-type]
        return str(caught.value)

    assert message(tmp_path / "no.npz") == f"{tmp_path}/no.npz: no such calibration file or folder"
    assert message(tmp_path) == f"{tmp_path}: no .npz file in this folder"
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 and nothing else")
    assert message(broken).startswith(f"{broken}: cannot be read as .npz: ")
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{}], object))
    assert message(pickled).startswith(f"{pickled}: cannot be read as .npz: Object arrays cannot be loaded")
    other = tmp_path / "data.csv"
    other.write_text("1,2")
    assert message(other) == (
        f"{other}: unknown kind of calibration data; expected .npz, a folder of .npz, or .txt with a tokenizer"
    )
    text = tmp_path / "t.txt"
    text.write_text("a text\n")
    assert message(text) == (
        f"{text}: text needs a tokenizer\n  hint: give the folder that holds tokenizer.json (--tokenizer)"
    )
    assert message(text, batch=0).startswith("calibration: batch, length and samples must be at least 1")


# -- text ----------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "on", "a", "mat", ".", ","]


def text_model() -> object:
    table = numpy_helper.from_array(np.eye(len(WORDS), 4, dtype=np.float32), "table")
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"])
        for n in ("input_ids", "attention_mask")
    )
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["kept"], to=1),
            helper.make_node("MatMul", ["rows", "w"], ["out"]),
        ],
        "g",
        [ids, mask],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "tokens", 2]),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["batch", "tokens"]),
        ],
        [table, weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def test_text_with_a_tokenizer(tmp_path: Path) -> None:
    graph = raised(text_model())
    folder, path = write_tokenizer(tmp_path / "t"), tmp_path / "d.txt"
    path.write_text("The cat sat on a mat.\n\nCats\nthe mat sat, a cat sat\n")
    found = load_calibration(path, graph, folder, batch=2, length=6)
    assert (found.samples, found.row_mask) == (3, "attention_mask")
    first, second = found.batches
    assert first["input_ids"].tolist() == [[2, 4, 5, 6, 8, 3], [2, 5, 7, 3, 0, 0]]
    assert first["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert set(first) == {"input_ids", "attention_mask"}  # the model has no token_type_ids
    assert second["input_ids"].shape == (1, 6)
    stats = collect(graph, found, row_mask=found.row_mask)
    assert stats.of("rows").count == 6 + 4 + 6


def test_a_whole_tokenizer_file_comes_first(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("")
    assert load_tokenizer(folder).encode("the cats").ids == [2, 4, 5, 7, 3]


def test_lower_case_is_as_the_configuration_says(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(folder).encode("The cat").ids == [2, 1, 5, 3]


def test_what_is_wrong_with_text_and_tokenizers(tmp_path: Path, seed: int) -> None:
    graph = raised(text_model())
    folder, path = write_tokenizer(tmp_path / "t"), tmp_path / "d.txt"

    def message(graph: Graph = graph) -> str:
        with pytest.raises(PlanishError) as caught:
            load_calibration(path, graph, folder)
        return caught.value.what

    path.write_text("\n \n")
    assert message() == f"{path}: holds no text"
    path.write_bytes(b"caf\xe9\n")
    assert message() == f"{path}: not UTF-8 text (byte 3)"
    path.write_text("a cat\n")
    assert message(raised(block())) == (
        "input 'x': a tokenizer does not give it; expected only input_ids, attention_mask, token_type_ids"
    )
    (folder / "vocab.txt").write_text("a\n")
    assert message() == f"{folder}/vocab.txt: not a WordPiece vocabulary; expected a line '[UNK]'"
    (folder / "tokenizer.json").write_text("{}")
    assert message().startswith(f"{folder}/tokenizer.json: not a tokenizer: ")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    assert message() == f"{folder}: no tokenizer here; expected tokenizer.json or vocab.txt"
