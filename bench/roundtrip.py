"""ONNX in, ONNX out: does every model come back computing the same bits?

Models: onnx's own backend tests (node cases, three folders of whole models, nine architectures without
their weights), real models where `bench/assets.py` has them, and a generated one of 3 GB with external data.
Each is run by ONNX Runtime with its optimiser off before and after a capture and an emission; outputs must
be equal bit for bit. The text form must parse back to an equal graph, and the evaluator is compared where it
can run the graph.

    python bench/roundtrip.py [--quick] [--json FILE]

Exit code 1 if a model fails, or if the 3 GB model takes 1 GB of memory or more.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ort_run import ORT_ERRORS, Feeds, RawTensor, run, same, session

from planish.capture.from_onnx import from_onnx
from planish.codegen.onnx import to_model, write
from planish.ir.constant import FileRange
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph

FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")
ORT_IR_VERSION = 13  # the newest that ONNX Runtime 1.31 reads; onnx writes its tests in a newer one
RSS_LIMIT = 1 << 30  # bytes


@dataclass
class Case:
    """A model and the inputs to run it on."""

    name: str
    model: onnx.ModelProto | Path
    feeds: Sequence[Feeds]


@dataclass
class Outcome:
    """What became of one case: `status` is ok, skipped (ONNX Runtime cannot run the original) or failed."""

    name: str
    status: str = "ok"
    why: str = ""
    canonical: int = 0
    opaque: int = 0
    text: bool = False
    evaluated: str = ""  # close, far, or why not
    opaque_ops: list[str] = field(default_factory=list)


# -- the cases -----------------------------------------------------------------------------------


def node_cases() -> Iterator[Case]:
    """onnx's node tests, with the inputs they come with."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        names = [v.name for v in case.model.graph.input]
        feeds = [
            {n: _array(v) for n, v in zip(names, inputs, strict=False) if v is not None} for inputs, _ in case.data_sets
        ]
        case.model.ir_version = min(case.model.ir_version, ORT_IR_VERSION)
        yield Case(case.name, case.model, feeds)


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def folder_cases() -> Iterator[Case]:
    """onnx's tests of whole models that need no download."""
    from onnx.backend.test.loader import load_model_tests

    for kind in FOLDERS:
        for case in load_model_tests(kind=kind):
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            ready = {t.name for t in model.graph.initializer}
            inputs = [v for v in model.graph.input if v.name not in ready or model.ir_version >= 4]
            feeds = []
            for data in sorted(folder.glob("test_data_set_*")):
                files = sorted(data.glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
                feeds.append({v.name: _read(v, f) for v, f in zip(inputs, files, strict=False)})
            yield Case(case.name, model, feeds)


def light_cases() -> Iterator[Case]:
    """The architectures that onnx ships without their weights (constants of one value instead)."""
    import onnx.backend.test

    for path in sorted((Path(onnx.backend.test.__file__).parent / "data" / "light").glob("*.onnx")):
        rng = np.random.default_rng(0)
        feeds = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session(path).get_inputs()}
        yield Case(path.stem, path, [feeds])


def _read(info: onnx.ValueInfoProto, path: Path) -> Any:
    data = path.read_bytes()
    kind = info.type.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))


def real_cases() -> Iterator[Case]:
    """The real models that can be had here, each with two sets of random inputs."""
    import assets

    def minilm(rng: np.random.Generator) -> Feeds:
        ids = rng.integers(0, 30522, (2, 24))
        mask = np.arange(24)[None, :] < np.array([[24], [15]])
        return {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": np.zeros_like(ids),
        }

    def floats(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
        return lambda rng: rng.standard_normal(shape).astype(np.float32)

    models: list[tuple[str, Callable[[], Path], Callable[[np.random.Generator], Feeds]]] = [
        ("minilm, dynamo exporter", lambda: assets.minilm_onnx(exporter="dynamo"), minilm),
        ("minilm, legacy exporter", lambda: assets.minilm_onnx(exporter="legacy"), minilm),
        ("ppocr rec", assets.ppocr_rec, lambda rng: {"x": floats(1, 3, 48, 160)(rng)}),
        ("typeseg unet", assets.typeseg_unet, lambda rng: {"ids": rng.integers(0, 64, (1, 1536))}),
        ("magika", assets.magika, lambda rng: {"bytes": rng.integers(0, 257, (2, 2048), np.int32)}),
        (
            "silero vad",
            assets.silero_vad,
            lambda rng: {
                "input": floats(1, 512)(rng),
                "state": floats(2, 1, 128)(rng),
                "sr": np.array(rng.choice([8000, 16000]), np.int64),
            },
        ),
    ]
    for name, make, feed in models:
        try:
            path = make()
        except assets.AssetError as error:
            print(f"  {name}: not here: {error}")
            continue
        yield Case(name, path, [feed(np.random.default_rng(seed)) for seed in range(2)])


# -- one case ------------------------------------------------------------------------------------


def check(case: Case, *, evaluate: bool = True, text: bool = True) -> Outcome:
    """Capture and emit a model, and compare."""
    outcome = Outcome(case.name)
    try:
        before = run(case.model, case.feeds)
        again = run(case.model, case.feeds)
    except ORT_ERRORS as error:
        outcome.status, outcome.why = "skipped", _line(error)
    try:
        graph = from_onnx(case.model)
        _count(graph, outcome)
        if outcome.status == "skipped":
            to_model(graph)  # must not crash either
            return outcome
        after = _round_trip(graph, case)
        if same(before, again):
            equal = same(before, after)
        else:
            equal = _alike(before, after)
        if not equal:
            outcome.status, outcome.why = "failed", "outputs differ"
    except PlanishError as error:
        if outcome.status != "skipped":
            outcome.status, outcome.why = "failed", str(error)
        return outcome
    except ORT_ERRORS as error:
        outcome.status, outcome.why = "failed", f"{type(error).__name__}: {error}"
        return outcome
    if text:
        outcome.text = _text(graph)
        if not outcome.text:
            outcome.status, outcome.why = "failed", "the text form parses to another graph"
    if evaluate:
        outcome.evaluated = _evaluate(graph, case, before)
    return outcome


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:160]


def _round_trip(graph: Graph, case: Case) -> list[list[Any]]:
    if isinstance(case.model, Path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "again.onnx"
            write(graph, path)
            return run(path, case.feeds)
    return run(to_model(graph), case.feeds)


def _alike(a: Any, b: Any) -> bool:
    """For random operators: the same shapes and dtypes."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_alike, a, b))
    return (getattr(a, "shape", None), getattr(a, "dtype", None)) == (
        getattr(b, "shape", None),
        getattr(b, "dtype", None),
    )


def _count(graph: Graph, outcome: Outcome) -> None:
    for node in graph.nodes:
        if node.op.opaque:
            outcome.opaque += 1
            outcome.opaque_ops.append(node.op.name)
        else:
            outcome.canonical += 1


def _text(graph: Graph) -> bool:
    from planish.ir.text import parse, render

    text, constants = render(graph)
    return parse(text, constants) == graph


def _evaluate(graph: Graph, case: Case, before: list[list[Any]]) -> str:
    from planish.ir.evaluator import evaluate

    verdict = "close"
    for feed, expected in zip(case.feeds, before, strict=True):
        try:
            got = evaluate(graph, dict(feed))
        except PlanishError as error:
            return _line(error)
        for name, value in zip((n for n, _ in graph.outputs), expected, strict=True):
            if not _close(got[name], value):
                verdict = "far"
    return verdict


def _close(a: Any, b: Any) -> bool:
    if isinstance(b, list):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(_close, a, b))
    if a is None or b is None:
        return a is None and b is None
    if isinstance(b, RawTensor):
        b = b.array()
    a = a.detach().double().numpy() if hasattr(a, "detach") else np.asarray(a)
    b = np.asarray(b)
    if b.dtype.kind in "OUST":
        return bool((a == b).all())
    if a.shape != b.shape:
        return False
    wide = b.astype(np.complex128 if b.dtype.kind == "c" else np.float64)
    narrow = b.dtype.itemsize == 2
    return bool(np.allclose(a, wide, rtol=2e-2 if narrow else 1e-3, atol=2e-3 if narrow else 1e-5, equal_nan=True))


# -- 3 GB ----------------------------------------------------------------------------------------

_BIG = """
import sys
sys.path.insert(0, {bench!r})
import roundtrip
roundtrip.big_round_trip({folder!r})
"""


def make_big(folder: Path, gigabytes: float = 3.0) -> Path:
    """A chain of linear layers with external data of that size, without ever holding it."""
    width, block = 4096, 4096 * 4096 * 4
    layers = max(1, round(gigabytes * 1e9 / block))
    graph = onnx.GraphProto(name="big")
    value = "x"
    graph.input.append(onnx.helper.make_tensor_value_info("x", 1, ["n", width]))
    rng = np.random.default_rng(0)
    with (folder / "big.onnx.data").open("wb") as data:
        for layer in range(layers):
            tensor = graph.initializer.add(name=f"w{layer}", data_type=1, dims=[width, width])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            offset = data.tell()
            for _ in range(16):
                rows = rng.standard_normal((width // 16, width), np.float32) / np.float32(64)
                data.write(rows.tobytes())
            for key, text in (("location", "big.onnx.data"), ("offset", offset), ("length", block)):
                tensor.external_data.add(key=key, value=str(text))
            graph.node.append(onnx.helper.make_node("MatMul", [value, tensor.name], [f"y{layer}"]))
            value = f"y{layer}"
    graph.output.append(onnx.helper.make_tensor_value_info(value, 1, ["n", width]))
    opset = onnx.helper.make_opsetid("", 17)
    path = folder / "big.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())
    return path


def big_round_trip(folder: str) -> None:
    """What the subprocess does: open, write again, check the bytes of each weight; print the peak memory."""
    source = Path(folder) / "big.onnx"
    start = time.perf_counter()
    graph = from_onnx(source)
    opened = time.perf_counter() - start
    target = Path(folder) / "again" / "big.onnx"
    target.parent.mkdir()
    write(graph, target)
    wrote = time.perf_counter() - start - opened
    again = from_onnx(target)
    if len(again) != len(graph):
        raise SystemExit("another number of nodes")
    for value in graph.constants:
        other = again.values[value.name]
        if value.constant is None or other.constant is None or value.constant.file is None:
            raise SystemExit(f"{value.name}: not a constant in a file")
        if other.constant.file is None or not _same_bytes(value.constant.file, other.constant.file):
            raise SystemExit(f"{value.name}: other bytes")
    peak = peak_memory()
    print(json.dumps({"open_s": opened, "write_s": wrote, "peak_bytes": peak}))


def peak_memory() -> int:
    """The most memory this process ever had resident, mapped pages included, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent had before the exec
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _same_bytes(a: FileRange, b: FileRange) -> bool:
    with a.path.open("rb") as left, b.path.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        remaining = a.length
        while remaining:
            size = min(8 << 20, remaining)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return a.length == b.length


def big(gigabytes: float = 3.0) -> dict[str, float]:
    """Round-trip a generated model in a subprocess: seconds and peak memory."""
    with tempfile.TemporaryDirectory(prefix="planish-big-") as folder:
        make_big(Path(folder), gigabytes)
        script = _BIG.format(bench=str(Path(__file__).parent), folder=folder)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the {gigabytes} GB model failed:\n{done.stdout}{done.stderr}")
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures


# -- main ----------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="every tenth node case, a model of 0.3 GB")
    parser.add_argument("--no-real", action="store_true", help="without the real models")
    parser.add_argument("--verbose", action="store_true", help="name what was skipped and what stayed opaque")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    nodes = list(node_cases())
    groups: dict[str, list[Case]] = {
        "node": nodes[::10] if options.quick else nodes,
        "folders": list(folder_cases()),
        "light": list(light_cases()),
    }
    if not options.no_real:
        sys.path.insert(0, str(Path(__file__).parent))
        groups["real"] = list(real_cases())
    print(f"onnx {onnx.__version__}, onnxruntime {version('onnxruntime')}, optimiser off, bit for bit")
    heads = ("models", "same", "skipped", "failed", "canonical", "opaque", "text", "evaluated", "close")
    print(f"{'':10}" + "".join(f"{head:>11}" for head in heads))
    outcomes: dict[str, list[Outcome]] = {}
    for group, cases in groups.items():
        done = outcomes[group] = [check(c) for c in cases]
        counts = (
            len(done),
            sum(o.status == "ok" for o in done),
            sum(o.status == "skipped" for o in done),
            sum(o.status == "failed" for o in done),
            sum(o.canonical for o in done),
            sum(o.opaque for o in done),
            sum(o.text for o in done),
            sum(o.evaluated in ("close", "far") for o in done),
            sum(o.evaluated == "close" for o in done),
        )
        print(f"{group:10}" + "".join(f"{count:11}" for count in counts))
    everything = [o for done in outcomes.values() for o in done]
    failed = [o for o in everything if o.status == "failed"]
    for outcome in failed:
        print(f"FAILED {outcome.name}: {outcome.why}")
    if options.verbose:
        _details(everything)
    size = 0.3 if options.quick else 3.0
    figures = big(size)
    within = figures["peak_bytes"] < RSS_LIMIT
    print(
        f"{size} GB with external data: opened in {figures['open_s']:.2f} s, "
        f"written in {figures['write_s']:.1f} s, peak memory {figures['peak_bytes'] / 1e6:.0f} MB"
    )
    if options.json:
        record = {"groups": {g: [asdict(o) for o in d] for g, d in outcomes.items()}, "big": figures}
        options.json.write_text(json.dumps(record, indent=1))
    print(
        f"roundtrip: {len(everything)} models, {sum(o.status == 'ok' for o in everything)} same, "
        f"{sum(o.status == 'skipped' for o in everything)} skipped (ONNX Runtime cannot run them), "
        f"{len(failed)} failed, {sum(o.opaque for o in everything)} opaque nodes, "
        f"peak {figures['peak_bytes'] / 1e6:.0f} MB, {time.perf_counter() - started:.0f} s"
    )
    return 1 if failed or not within else 0


def _details(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.status == "skipped":
            print(f"skipped {outcome.name}: {outcome.why}")
        if outcome.evaluated not in ("close", ""):
            print(f"evaluated {outcome.name}: {outcome.evaluated}")
    for name, count in Counter(op for o in outcomes for op in o.opaque_ops).most_common():
        print(f"opaque {count:5} {name}")


if __name__ == "__main__":
    sys.exit(main())
