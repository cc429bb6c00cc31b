"""Files: what cannot be read says why, external data stays in its folder, outputs are whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import check_text
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import linear

from planish.capture.from_onnx import from_onnx
from planish.codegen import files
from planish.codegen.onnx import to_model, write
from planish.ir.errors import InvalidModelError, PlanishError
from planish.ir.files import atomic, atomic_group

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import roundtrip
from ort_run import run, same

FEEDS = [{"x": np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)}]
LISTED = list[str]


def save(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, **changes: str) -> Path:
    """The linear model with its weight in `weights.bin`; `changes` edits the entries that say where."""
    model = linear()
    tensor = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(bytes(64) + tensor.raw_data)
    entries = {"location": "weights.bin", "offset": "64", "length": "4096"} | changes
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    return save(model, folder / "model.onnx")


# -- reading -------------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"none\.onnx: cannot be read: No such file"):
        from_onnx(tmp_path / "none.onnx")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="is a directory; expected an ONNX file"):
        from_onnx(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file; expected an ONNX model"),
        (b"not a protobuf at all", "not an ONNX model, or cut off; protobuf cannot parse its 21 bytes"),
        (b"\x08\x08", "not an ONNX model: it holds no graph"),
        (linear().SerializeToString()[:-100], "not an ONNX model, or cut off"),
    ],
)
def test_files_that_are_not_models(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(InvalidModelError, match=message):
        from_onnx(path)


def test_a_path_that_is_none() -> None:
    with pytest.raises(InvalidModelError, match="not a path"):
        from_onnx("a\0b")


def _empty(model: ModelProto) -> None:
    model.graph.CopyFrom(onnx.GraphProto(name="empty"))


def _no_outputs(model: ModelProto) -> None:
    del model.graph.output[:]


def _unknown_op(model: ModelProto) -> None:
    model.graph.node[0].op_type = "MatMull"


def _dangling(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "producct"


def _dangling_output(model: ModelProto) -> None:
    model.graph.output[0].name = "yy"


def _cycle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _defined_twice(model: ModelProto) -> None:
    model.graph.node[0].output[0] = "y"


def _weight_twice(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _weight_and_result(model: ModelProto) -> None:
    model.graph.initializer[0].name = "y"


def _output_twice(model: ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def _attribute_twice(model: ModelProto) -> None:
    model.graph.node[1].attribute.extend([helper.make_attribute("a", 1)] * 2)


def _no_opset(model: ModelProto) -> None:
    model.opset_import[0].domain = "other"


def _bad_opset(model: ModelProto) -> None:
    model.opset_import[0].version = -3


def _two_opsets(model: ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx", version=12)


def _short_weight(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"123"


def _short_typed_weight(model: ModelProto) -> None:
    tensor = helper.make_tensor("w", TensorProto.INT64, [3], [1, 2, 3])
    tensor.dims[0] = 4
    model.graph.initializer[0].CopyFrom(tensor)


def _negative_dim(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -32


def _unknown_element(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def _nameless_weight(model: ModelProto) -> None:
    model.graph.initializer[0].name = ""


def _nameless_input(model: ModelProto) -> None:
    model.graph.input[0].name = ""


def _segment(model: ModelProto) -> None:
    model.graph.initializer[0].segment.begin = 1


def _mismatch(model: ModelProto) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([16, 64])


MISTAKES: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "empty": (_empty, "empty graph: no nodes and no outputs"),
    "no outputs": (_no_outputs, "the graph has no outputs"),
    "unknown operator": (
        _unknown_op,
        "operator 'MatMull': unknown in opset 17\n"
        "  in node 0 'proj': %product = MatMull(%x, %w)\n"
        "  hint: did you mean 'MatMul'?",
    ),
    "dangling": (
        _dangling,
        "value 'producct': read but never defined\n"
        "  in node 1: %y = Add(%producct, %b)\n"
        "  hint: did you mean 'product'?",
    ),
    "dangling output": (_dangling_output, "output 'yy': never defined\n  hint: did you mean 'y'?"),
    "cycle": (_cycle, "the graph has a cycle\n  in node 0 'proj': %product = MatMul(%y, %w)"),
    "defined twice": (_defined_twice, "value 'y': defined twice"),
    "weight twice": (_weight_twice, "value 'w': defined twice"),
    "weight and result": (_weight_and_result, "value 'y': defined twice"),
    "output twice": (_output_twice, "output 'y': listed twice"),
    "attribute twice": (_attribute_twice, "attribute 'a': given twice\n  in node 1: %y = Add(%product, %b)"),
    "no opset": (_no_opset, "the model imports no opset of ONNX's default domain"),
    "bad opset": (_bad_opset, "opset of domain 'onnx': version -3; expected >= 1"),
    "two opsets": (_two_opsets, "opset of domain 'onnx': imported in two versions"),
    "short weight": (
        _short_weight,
        "tensor 'w': wrong length of data; expected 4096 bytes for shape [32, 32], got 3",
    ),
    "short typed weight": (
        _short_typed_weight,
        "tensor 'w': wrong length of data; expected 4 elements for shape [4], got 3",
    ),
    "negative dim": (_negative_dim, "tensor 'w': negative dim in shape [-32, 32]"),
    "unknown element": (_unknown_element, "tensor 'w': unknown element type 99"),
    "nameless weight": (_nameless_weight, "an initialiser has no name"),
    "nameless input": (_nameless_input, "an input of the graph has no name"),
    "segment": (_segment, "tensor 'w': stored in segments, which no version of ONNX defines"),
    "mismatch": (_mismatch, "in node 0 'proj': %product = MatMul(%x, %w) (matmul of f32[n, 32] and f32[16, 64])"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_models(name: str) -> None:
    mistake, message = MISTAKES[name]
    model = linear()
    mistake(model)
    with pytest.raises(InvalidModelError) as caught:
        from_onnx(model)
    assert message in str(caught.value)


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    data = linear().SerializeToString().replace(b"product", b"prod\xffct")
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(InvalidModelError, match=r"NodeProto.*: not UTF-8 text: b'prod\\xffct'"):
        from_onnx(path)


def test_an_opset_of_the_future_is_kept_opaque() -> None:
    model = linear()
    model.opset_import[0].version = 99
    with pytest.warns(UserWarning, match="opset 99 is newer than"):
        graph = from_onnx(model)
    assert all(n.op.opaque for n in graph.nodes)
    assert to_model(graph).opset_import[0].version == 99


def test_weights_that_are_not_finite_are_read() -> None:
    model = linear()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full(32, np.nan, np.float32), "b"))
    check_text(from_onnx(model))


# -- external data -------------------------------------------------------------------------------


def test_external_data_is_opened_without_loading(tmp_path: Path) -> None:
    graph = from_onnx(external(tmp_path))
    weight = graph.values["w"].constant
    assert weight is not None
    assert not weight.loaded
    assert weight.array().tobytes() == linear().graph.initializer[0].raw_data
    check_text(graph)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "absent.bin"}, r"tensor 'w': missing external data: .*absent\.bin: no such file"),
        ({"location": ""}, "tensor 'w': its external data has no location"),
        ({"location": "../weights.bin"}, r"'\.\./weights\.bin' leads outside the model's folder"),
        ({"location": "/etc/passwd"}, "'/etc/passwd' leads outside the model's folder"),
        ({"location": "C:\\weights.bin"}, "leads outside the model's folder"),
        ({"location": "..\\weights.bin"}, "leads outside the model's folder"),
        ({"location": "link.bin"}, r"'link\.bin' leads outside the model's folder"),
        ({"location": "a\0b"}, "is not a path|leads outside|missing external data"),
        ({"offset": "4096"}, r"external data ends early; expected 8192 bytes in .*weights\.bin, got 4160"),
        ({"offset": "-1"}, "offset of its external data is '-1'; expected a number >= 0"),
        ({"offset": "x"}, "offset of its external data is 'x'; expected a number >= 0"),
        ({"length": "4000"}, r"wrong length of external data; expected 4096 bytes for shape \[32, 32\], got 4000"),
    ],
)
def test_external_data_that_cannot_be_used(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(5000))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(InvalidModelError, match=message):
        from_onnx(external(folder, **changes))


def test_a_model_in_memory_needs_its_folder(tmp_path: Path) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(InvalidModelError, match=r"external data 'weights\.bin' of a model in memory"):
        from_onnx(model)
    assert to_model(from_onnx(model, base_dir=tmp_path)).graph.initializer[0].raw_data


def test_links_into_a_folder_of_blobs_are_followed(tmp_path: Path) -> None:
    """A hub's cache: the model and its data are links to files that lie side by side elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    external(blobs)
    for name in ("model.onnx", "weights.bin"):
        (snapshot / name).symlink_to(blobs / name)
    graph = from_onnx(snapshot / "model.onnx")
    assert graph.values["w"].constant is not None


def test_length_may_be_left_out(tmp_path: Path) -> None:
    graph = from_onnx(external(tmp_path, length=""))
    weight = graph.values["w"].constant
    assert weight is not None
    assert weight.array().tobytes() == linear().graph.initializer[0].raw_data


def test_external_data_inside_subgraphs_comes_along(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[4] x) => (float[4] y) {
          y = If (c) <
            then_branch = a () => (float[4] t) <float[4] w = {1, 2, 3, 4}> { t = Add (x, w) },
            else_branch = b () => (float[4] e) { e = Identity (x) }
          >
        }"""
    )
    tensor = model.graph.node[0].attribute[0].g.initializer[0]
    (tmp_path / "inner.bin").write_bytes(numpy_helper.to_array(tensor).tobytes())
    tensor.CopyFrom(TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL))
    tensor.external_data.add(key="location", value="inner.bin")
    path = save(model, tmp_path / "m.onnx")
    again = tmp_path / "elsewhere"
    again.mkdir()
    write(from_onnx(path), again / "m.onnx")
    feeds = [{"c": np.array(True), "x": np.ones(4, np.float32)}]
    assert same(run(path, feeds), run(again / "m.onnx", feeds))


# -- writing -------------------------------------------------------------------------------------


def names(folder: Path) -> LISTED:
    return sorted(p.name for p in folder.iterdir())


def test_weights_in_the_file_by_default(tmp_path: Path) -> None:
    write(from_onnx(linear()), tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx"]
    expected = run(linear(), FEEDS)
    assert same(expected, run(tmp_path / "m.onnx", FEEDS))


def test_external_data_stays_external(tmp_path: Path) -> None:
    source = external(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    write(from_onnx(source), target / "m.onnx")
    assert names(target) == ["m.onnx", "m.onnx.data"]
    assert same(run(source, FEEDS), run(target / "m.onnx", FEEDS))
    onnx.checker.check_model(target / "m.onnx")
    written = onnx.load(target / "m.onnx", load_external_data=False)
    assert {e.key: e.value for e in written.graph.initializer[0].external_data} == {
        "location": "m.onnx.data",
        "offset": "0",
        "length": "4096",
    }
    assert written.graph.initializer[1].raw_data  # small ones stay inside
    write(from_onnx(target / "m.onnx"), tmp_path / "one.onnx", external=False)
    assert len(onnx.load(tmp_path / "one.onnx").graph.initializer[0].raw_data) == 4096


def test_external_data_on_request(tmp_path: Path) -> None:
    write(from_onnx(linear()), tmp_path / "m.onnx", external=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert same(run(linear(), FEEDS), run(tmp_path / "m.onnx", FEEDS))


def test_writing_over_the_weights_that_are_read(tmp_path: Path) -> None:
    write(from_onnx(linear()), tmp_path / "m.onnx", external=True)
    before = (tmp_path / "m.onnx.data").read_bytes()
    graph = from_onnx(tmp_path / "m.onnx")
    with pytest.raises(PlanishError, match=r"m\.onnx\.data: the weights that are being written are read from it"):
        write(graph, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_bytes() == before
    write(from_onnx(linear()), tmp_path / "m.onnx", external=True)  # weights in memory may replace it


def test_data_that_shrank_since_it_was_opened(tmp_path: Path) -> None:
    graph = from_onnx(external(tmp_path))
    os.truncate(tmp_path / "weights.bin", 1000)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InvalidModelError, match=r"weights\.bin: external data ends early; expected 4160 bytes"):
        write(graph, target / "m.onnx")
    assert names(target) == []


def test_unwritable_outputs(tmp_path: Path) -> None:
    graph = from_onnx(linear())
    with pytest.raises(PlanishError, match="cannot be written: No such file or directory"):
        write(graph, tmp_path / "no" / "m.onnx")
    with pytest.raises(PlanishError, match="cannot be written: is a directory"):
        write(graph, tmp_path)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic(path) as handle:
            handle.write(b"new, but")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_an_interrupt_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (tmp_path / n for n in "abc")
    first.write_bytes(b"old a")
    second.write_bytes(b"old b")
    replace = os.replace
    calls: LISTED = []

    def interrupted(source: object, target: object) -> None:
        calls.append(str(target))
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(files.os, "replace", interrupted)

    def write_all() -> None:
        with atomic_group([first, second, third]) as handles:
            for handle in handles:
                handle.write(b"new")

    with pytest.raises(KeyboardInterrupt):
        write_all()
    assert names(tmp_path) == ["a", "b"]
    assert (first.read_bytes(), second.read_bytes()) == (b"old a", b"old b")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(PlanishError, match="cannot be written: 4224 bytes needed, 10 free on the disk"):
        write(from_onnx(linear()), tmp_path / "m.onnx", external=True)


def test_permissions_of_the_old_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write(from_onnx(linear()), path)
    assert path.stat().st_mode & 0o777 == 0o640


# -- large models --------------------------------------------------------------------------------


def big(gigabytes: float) -> dict[str, float]:
    script = f"import json, roundtrip; print(json.dumps(roundtrip.big({gigabytes})))"
    folder = Path(roundtrip.__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
def test_three_gigabytes_in_one() -> None:
    figures = big(3.0)
    assert figures["peak_bytes"] < 1 << 30
    assert figures["open_s"] < 20
