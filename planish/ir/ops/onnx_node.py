"""Run one ONNX node, as a model of its own.

Tried in turn: ONNX Runtime in the dtype asked for, onnx's reference implementation in it, ONNX Runtime in
float32, then each value in its own dtype. A node that ran in a narrower dtype than was asked for is listed in
`Wide.narrowed`. What worked is remembered for the node as long as it lives and keeps its attributes.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as states

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Blob, Node, Value
from planish.ir.onnx_attributes import ABSENT, RESERVED, attribute_proto, tensor_of
from planish.ir.ops.base import Wide
from planish.ir.types import (
    WIDE_FLOATS,
    from_numpy_dtype,
    from_torch_dtype,
    is_float,
    numpy_dtype,
    onnx_enum,
    torch_dtype,
)

OPSET = 21  # of the default domain, where the node does not say
IR_VERSION = 10
# what ONNX Runtime and the reference implementation raise for a node that they cannot run
_ERRORS = (
    states.EPFail,
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Python loops over single elements in the reference implementation: minutes on an image
_SLOW = frozenset({"DeformConv", "GridSample", "Resize", "RoiAlign", "Upsample"})

# numpy, and so ONNX Runtime's python binding, has no such dtype: passed as another and cast in the model
_CARRIED = {
    **dict.fromkeys(
        ("bf16", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f8e8m0", "f4e2m1", "f6e2m3", "f6e3m2"), "f32"
    ),
    **dict.fromkeys(("u2", "u4"), "u8"),
    **dict.fromkeys(("i2", "i4"), "i8"),
}

_CARRIER = "_planish_carrier"  # what the names of these end with

Runner = Callable[[Mapping[str, Any]], Sequence[Any]]
Attempt = tuple[str, str | None]  # engine, dtype of the floats (None: each its own)


class _Memory:
    """What is known about running one node: sessions, and the attempt that worked last."""

    def __init__(self, attributes: Mapping[str, Attribute]) -> None:
        self.attributes = attributes  # the rewriter makes a new mapping for every change
        self.runners: dict[tuple[object, ...], Runner] = {}
        self.best: dict[tuple[object, ...], Attempt] = {}


_memories: WeakKeyDictionary[Node, _Memory] = WeakKeyDictionary()


def evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    """The results of an ONNX node; an absent result is None.

    Raises:
        PlanishError: neither ONNX Runtime nor the reference implementation can run the node.
    """
    memory = _memories.get(node)
    if memory is None or memory.attributes is not node.attributes:
        memory = _memories[node] = _Memory(node.attributes)
    signature = tuple(_kind(value, held) for value, held in zip(node.operands, operands, strict=True))
    asked = None if wide.dtype is None else from_torch_dtype(wide.dtype)
    attempts = _attempts(node, asked)
    best = memory.best.get((asked, signature))
    if best is not None:
        attempts = [best, *(a for a in attempts if a != best)]
    failures = []
    for attempt in attempts:
        try:
            results = _run(node, operands, attempt, signature, memory)
        except _Failure as failure:
            failures.append(f"{attempt[0]}{f' in {attempt[1]}' if attempt[1] else ''}: {failure}")
            continue
        memory.best[(asked, signature)] = attempt
        if asked is not None and (
            (attempt[1] != asked and any(map(_is_float, (*operands, *results))))
            or any(_narrower(r, v, wide.dtype) for r, v in zip(results, node.results, strict=True))
        ):
            wide.narrowed.append(node)
        return [_held(result, value, wide) for result, value in zip(results, node.results, strict=True)]
    raise PlanishError(
        f"{node.op.name}: cannot be evaluated here",
        where=str(node),
        hint="\n    ".join(dict.fromkeys(failures)),
    )


def _attempts(node: Node, asked: str | None) -> list[Attempt]:
    name = node.op.name.partition("::")[2]
    constants = any(v is not None and v.is_constant for v in node.operands)
    found: list[Attempt] = []
    for dtype in dict.fromkeys([asked, *(["f32"] if asked is not None else []), None]):
        found.append(("onnxruntime", dtype))
        if constants:  # some kernels want their weights as initialisers
            found.append(("onnxruntime with initialisers", dtype))
        if dtype == asked and (asked is None or name not in _SLOW):
            found.append(("reference", dtype))
    if asked is not None:
        found.append(("reference", None))
    return found


class _Failure(Exception):
    """An attempt failed; the text is its first line."""


def _run(
    node: Node, operands: Sequence[Any], attempt: Attempt, signature: tuple[object, ...], memory: _Memory
) -> list[Any]:
    engine, dtype = attempt
    captures = node.attributes.get("captures")
    inner = [str(c) for c in captures] if isinstance(captures, tuple) else []
    prefix = _prefix(inner)
    names = [f"{prefix}_in_{i}" if held is not None else "" for i, held in enumerate(operands)]
    explicit = len(names) - len(inner)
    names[explicit:] = inner
    arrays = {
        name: _array(value, held, dtype)
        for name, value, held in zip(names, node.operands, operands, strict=True)
        if name and held is not None
    }
    reference = engine == "reference"
    initialisers: dict[str, np.ndarray] = {}
    if engine.endswith("initialisers"):
        for name, value in zip(names, node.operands, strict=True):
            if value is not None and value.is_constant and isinstance(arrays.get(name), np.ndarray):
                initialisers[name] = arrays.pop(name)
    key = (engine, dtype, signature)
    runner = memory.runners.get(key)
    try:
        if runner is None:
            model = _model(node, names[:explicit], arrays, initialisers, dtype, carried=not reference)
            runner = _reference_runner(model) if reference else _session_runner(model)
            if not initialisers:
                memory.runners[key] = runner
        results = runner(arrays)
    except _ERRORS as error:
        text = str(error).strip()
        raise _Failure(text.splitlines()[0][:300] if text else type(error).__name__) from error
    present = iter(results)
    return [None if value.type == ABSENT else next(present) for value in node.results]


def _prefix(captures: Iterable[str]) -> str:
    """What the names in the model begin with: nothing that a subgraph knows by such a name."""
    prefix = "planish"
    while any(name.startswith(prefix) for name in captures):
        prefix += "_"
    return prefix


def _session_runner(model: onnx.ModelProto) -> Runner:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(arrays: Mapping[str, Any]) -> Sequence[Any]:
        return session.run(None, dict(_carried(*item) for item in arrays.items()))  # type: ignore[no-any-return]

    return run


def _reference_runner(model: onnx.ModelProto) -> Runner:
    evaluator = ReferenceEvaluator(model)

    def run(arrays: Mapping[str, Any]) -> Sequence[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluator.run(None, dict(arrays))  # type: ignore[return-value]

    return run


# -- the model -----------------------------------------------------------------------------------


def _model(
    node: Node,
    inputs: Sequence[str],
    arrays: Mapping[str, Any],
    initialisers: Mapping[str, np.ndarray],
    dtype: str | None,
    carried: bool,
) -> onnx.ModelProto:
    """A model of one node, its floats in `dtype` (None: each its own).

    With `carried`, dtypes that numpy lacks come and go as others (`_CARRIED`).
    """
    dialect, _, op_type = node.op.name.partition("::")
    domain = "" if dialect == "onnx" else dialect
    proto = onnx.NodeProto(op_type=op_type, domain=domain, input=inputs)
    overload = node.attributes.get("onnx_overload")
    if isinstance(overload, str):
        proto.overload = overload
    for name, attribute in node.attributes.items():
        if name not in RESERVED:
            proto.attribute.append(attribute_proto(name.removeprefix("onnx."), attribute))
    prefix = _prefix(arrays)
    model = onnx.ModelProto(ir_version=IR_VERSION)
    graph = model.graph
    graph.name = "node"
    for name, array in arrays.items():
        kind = _element(array)
        if carried and kind in _CARRIED:
            source = name + _CARRIER
            graph.node.append(onnx.helper.make_node("Cast", [source], [name], to=onnx_enum(kind)))
            graph.input.add(name=source).type.tensor_type.elem_type = onnx_enum(_CARRIED[kind])
        elif isinstance(array, list):
            type_ = graph.input.add(name=name).type.sequence_type.elem_type
            type_.tensor_type.elem_type = onnx_enum(kind)
        else:
            graph.input.add(name=name).type.tensor_type.elem_type = onnx_enum(kind)
    for name, array in initialisers.items():
        graph.initializer.append(tensor_of(Constant.of(array), name))
    proto.output.extend("" if v.type == ABSENT else f"{prefix}_out_{i}" for i, v in enumerate(node.results))
    graph.node.append(proto)
    for name, value in zip(proto.output, node.results, strict=True):
        if not name:
            continue
        if carried and value.dtype in _CARRIED and not (dtype is not None and value.dtype in WIDE_FLOATS):
            carrier = onnx_enum(_CARRIED[value.dtype])
            graph.node.append(onnx.helper.make_node("Cast", [name], [name + _CARRIER], to=carrier))
            graph.output.add(name=name + _CARRIER)
        else:
            graph.output.add(name=name)
    model.functions.extend(_functions(node))
    for name, version in _opsets(node, domain, model).items():
        model.opset_import.add(domain=name, version=version)
    return model


@lru_cache(maxsize=4)
def _functions_in(data: bytes) -> tuple[onnx.FunctionProto, ...]:
    return tuple(onnx.ModelProto.FromString(zlib.decompress(data)).functions)


def _functions(node: Node) -> tuple[onnx.FunctionProto, ...]:
    """The local functions of the model that the node came from (see `planish.capture.onnx_file`)."""
    rest = node.graph.meta.get("onnx.rest") if node.graph is not None else None
    return _functions_in(rest.data) if isinstance(rest, Blob) else ()


def _opsets(node: Node, domain: str, model: onnx.ModelProto) -> dict[str, int]:
    """The opset versions: the node's own, those of the model it came from, 1 for any other that is used."""
    known: dict[str, int] = {}
    pairs = node.graph.meta.get("onnx.opsets") if node.graph is not None else None
    for pair in pairs if isinstance(pairs, tuple) else ():
        if isinstance(pair, tuple) and isinstance(pair[0], str) and isinstance(pair[1], int):
            known["" if pair[0] == "ai.onnx" else pair[0]] = pair[1]
    own = node.attributes.get("onnx_opset")
    if isinstance(own, int):
        known[domain] = own
    used = {"", domain, *(function.domain for function in model.functions)}
    used.update(_domains(model.graph.node))
    return {name: known.get(name, OPSET if name == "" else 1) for name in sorted(used)}


def _domains(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield "" if node.domain == "ai.onnx" else node.domain
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _domains(graph.node)


# -- values --------------------------------------------------------------------------------------


def _kind(value: Value | None, held: Any) -> object:
    """What of an operand decides how the model looks."""
    if isinstance(held, list):
        return ("sequence", tuple({str(item.dtype) for item in held}))
    return None if held is None else (str(getattr(held, "dtype", "")), None if value is None else value.dtype)


def _array(value: Value | None, held: Any, dtype: str | None) -> Any:
    """An operand as a numpy array, its floats in `dtype`, or in the value's own dtype if that is None."""
    if isinstance(held, list | tuple):
        return [_array(None, item, dtype) for item in held]
    if not isinstance(held, torch.Tensor):
        return held
    own = value.dtype if value is not None else None
    own = own or from_torch_dtype(held.dtype)
    if own in WIDE_FLOATS and dtype is not None:
        own = dtype
    if is_float(own) and held.dtype in (torch.bfloat16, *_float8()):
        held = held.float()
    array = held.detach().cpu().contiguous().numpy()
    wanted = numpy_dtype(own)
    if array.dtype == wanted:
        return array
    with np.errstate(all="ignore"):
        return array.astype(wanted)


def _float8() -> tuple[torch.dtype, ...]:
    return tuple(torch_dtype(n) for n in ("f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"))


def _element(array: Any) -> str:
    """The IR dtype of an array, or of the items of a list."""
    if isinstance(array, list):
        return _element(array[0]) if array else "f32"
    return from_numpy_dtype(array.dtype)


def _carried(name: str, array: Any) -> tuple[str, Any]:
    """An input as the session takes it."""
    if isinstance(array, list):
        return name, [_carried(name, item)[1] for item in array]
    carrier = _CARRIED.get(_element(array))
    return (name, array) if carrier is None else (name + _CARRIER, array.astype(numpy_dtype(carrier)))


def _held(result: Any, value: Value | None, wide: Wide) -> Any:
    """A result as the evaluation holds it."""
    if isinstance(result, list):
        return [_held(item, None, wide) for item in result]
    if not isinstance(result, np.generic | np.ndarray):
        return result
    held = wide.hold(Constant.of(np.asarray(result)))
    if value is not None and value.dtype in _CARRIED:
        return held.to(wide.of(value.dtype))
    return held


def _is_float(held: Any) -> bool:
    if isinstance(held, list | tuple):
        return any(_is_float(item) for item in held)
    if isinstance(held, torch.Tensor):
        return held.is_floating_point()
    return isinstance(held, np.generic | np.ndarray) and held.dtype.kind != "O" and is_float(_element(held))


def _narrower(result: Any, value: Value | None, dtype: torch.dtype | None) -> bool:
    """True for floats that came in a narrower dtype though arithmetic could have been done in `dtype`."""
    if isinstance(result, list):
        return any(_narrower(item, None, dtype) for item in result)
    if dtype is None or not _is_float(result):
        return False
    if value is not None and value.dtype is not None and value.dtype not in WIDE_FLOATS:
        return False
    return bool(result.dtype.itemsize < dtype.itemsize)
