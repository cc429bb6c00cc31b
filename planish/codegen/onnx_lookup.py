"""How lookups, running sums, resizing and grouped products are written for ONNX.

gather_nd        the indexed axes first (Transpose), the indices on a new last axis, GatherND
index_add        the axis first, ScatterND with reduction add
grouped_matmul   for each expert a Slice of its rows and a MatMul, joined by Concat
reassemble       segments by falling size: a Gather and a Mul for each place in a segment, joined by Concat
resize           Resize with torch's ways of placing pixels
"""

from __future__ import annotations

import numpy as np

from planish.codegen.onnx_emission import Emission, emitter
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.types import onnx_enum


def _axis(node: Node) -> int:
    axis = node.attributes.get("axis", node.op.attributes["axis"])
    assert isinstance(axis, int)
    return axis


def _operand(node: Node, index: int) -> Value:
    value = node.operands[index]
    assert value is not None
    return value


def _indices(e: Emission, value: Value) -> str:
    return e.name(value) if value.dtype == "i64" else e.add("Cast", [e.name(value)], to=onnx_enum("i64"))


@emitter("cumsum")
def _cumsum(node: Node, e: Emission) -> None:
    axis = e.weight(Constant(np.array(_axis(node), np.int64), "i64", ()), "axis")
    e.add("CumSum", [e.name(_operand(node, 0)), axis], e.outputs(node))


@emitter("gather_elements")
def _gather_elements(node: Node, e: Emission) -> None:
    e.add("GatherElements", [e.name(v) for v in node.operands], e.outputs(node), axis=_axis(node))


@emitter("scatter_elements")
def _scatter_elements(node: Node, e: Emission) -> None:
    e.add("ScatterElements", [e.name(v) for v in node.operands], e.outputs(node), axis=_axis(node))


@emitter("topk")
def _topk(node: Node, e: Emission) -> None:
    k = node.attributes.get("k", 1)
    assert isinstance(k, int)
    largest, in_order = (int(bool(node.attributes.get(name, True))) for name in ("largest", "sorted"))
    x, (values, places) = _operand(node, 0), e.outputs(node)
    data, narrow = e.name(x), x.dtype == "bf16"  # which TopK does not take: float32 has the same order
    if narrow:
        data = e.add("Cast", [data], to=onnx_enum("f32"))
    found = e.fresh("largest") if narrow else values
    e.add("TopK", [data, e.ints((k,), "k")], [found, places], axis=_axis(node), largest=largest, sorted=in_order)
    if narrow:
        e.add("Cast", [found], values, to=onnx_enum("bf16"))


@emitter("nonzero")
def _nonzero(node: Node, e: Emission) -> None:
    places = e.add("NonZero", [e.name(_operand(node, 0))])  # [1, n]
    e.add("Reshape", [places, e.ints((-1,), "shape")], e.outputs(node))


@emitter("gather_nd")
def _gather_nd(node: Node, e: Emission) -> None:
    x, indices = _operand(node, 0), [_operand(node, i) for i in range(1, len(node.operands))]
    stacked = bool(node.attributes.get("stacked", False))
    if stacked and not _axis(node):
        e.add("GatherND", [e.name(x), _indices(e, indices[0])], e.outputs(node))
        return
    if x.rank is None or node.result.rank is None or any(i.rank is None for i in indices):
        raise e.fail(node, "an unknown rank is not possible")
    axis, taken = _axis(node) % x.rank, len(indices)
    if stacked:
        last = indices[0].shape[-1] if indices[0].shape else None
        if not isinstance(last, int):
            raise e.fail(node, "an unknown number of indexed axes is not possible")
        taken = last
    order = [*range(axis, axis + taken), *range(axis), *range(axis + taken, x.rank)]
    data = e.name(x)
    if axis:
        data = e.add("Transpose", [data], perm=tuple(order))
    where = _indices(e, indices[0]) if stacked else _stacked(e, indices)
    found = e.add("GatherND", [data, where], None if axis else e.outputs(node))
    if axis:
        span = node.result.rank - (x.rank - taken)
        back = [*range(span, span + axis), *range(span), *range(span + axis, node.result.rank)]
        e.add("Transpose", [found], e.outputs(node), perm=tuple(back))


def _stacked(e: Emission, indices: list[Value]) -> str:
    """Indices that broadcast against each other, on the last axis of one tensor."""
    places = [_indices(e, i) for i in indices]
    if len(places) > 1:
        total = places[0]
        for place in places[1:]:
            total = e.add("Add", [total, place])
        shape = e.add("Shape", [total])
        places = [e.add("Expand", [place, shape]) for place in places]
    last = e.ints((-1,), "axes")
    places = [e.add("Unsqueeze", [place, last]) for place in places]
    return places[0] if len(places) == 1 else e.add("Concat", places, axis=-1)


@emitter("index_add")
def _index_add(node: Node, e: Emission) -> None:
    if e.since("ScatterND") < 16:
        raise e.fail(node, "adding at positions is not possible")
    x, indices, source = (_operand(node, i) for i in range(3))
    if x.rank is None:
        raise e.fail(node, "an unknown rank is not possible")
    axis = _axis(node) % x.rank
    swap = list(range(x.rank))
    swap[0], swap[axis] = swap[axis], swap[0]
    data, updates = e.name(x), e.name(source)
    if axis:
        data, updates = (e.add("Transpose", [name], perm=tuple(swap)) for name in (data, updates))
    where = e.add("Unsqueeze", [_indices(e, indices), e.ints((-1,), "axes")])
    summed = e.add("ScatterND", [data, where, updates], None if axis else e.outputs(node), reduction="add")
    if axis:
        e.add("Transpose", [summed], e.outputs(node), perm=tuple(swap))


@emitter("reassemble")
def _reassemble(node: Node, e: Emission) -> None:
    x, *given = (_operand(node, i) for i in range(4))
    if any(v.constant is None for v in given) or x.rank is None:
        raise e.fail(node, "an index, sizes or weights that are computed are not possible")
    index, sizes, weights = (v.constant.wide() for v in given if v.constant is not None)
    axis = _axis(node) % x.rank
    order = np.argsort(-sizes, kind="stable")
    starts, counts = (np.cumsum(sizes) - sizes).astype(np.int64)[order], sizes.astype(np.int64)[order]
    back = np.argsort(order, kind="stable")
    sorted_already = bool((back == np.arange(len(back))).all())

    def taken(places: np.ndarray) -> str:
        """x at index[places], times weights[places]."""
        entries = Constant(index[places].astype(np.int64), "i64", places.shape)
        y = e.add("Gather", [e.name(x), e.weight(entries, "index")], axis=axis)
        factors = weights[places]
        if (factors == 1).all():
            return y
        shape = (len(places), *(1,) * (x.rank - 1 - axis))  # type: ignore[operator]
        return e.add("Mul", [y, e.weight(Constant(factors.reshape(shape), x.dtype or "f32", shape), "weights")])

    total, held = "", 0
    for depth in range(int(counts[0]) - 1, -1, -1):  # the last entry of the largest segments first
        long = int((counts > depth).sum())
        places = starts[:long] + depth
        parts = [e.add("Add", [taken(places[:held]), total])] if held else []
        if long > held:
            parts.append(taken(places[held:]))
        total, held = parts[0] if len(parts) == 1 else e.add("Concat", parts, axis=axis), long
    if sorted_already:
        e.add("Identity", [total], e.outputs(node))
        return
    entries = Constant(back.astype(np.int64), "i64", back.shape)
    e.add("Gather", [total, e.weight(entries, "index")], e.outputs(node), axis=axis)


@emitter("grouped_matmul")
def _grouped_matmul(node: Node, e: Emission) -> None:
    x, weight, offsets = (_operand(node, i) for i in range(3))
    experts = weight.shape[0] if weight.shape is not None else None
    if not isinstance(experts, int):
        raise e.fail(node, "an unknown number of experts is not possible")
    ends, rows = _indices(e, offsets), e.ints((0,), "axes")
    start = e.ints((0,), "start")
    parts = []
    for expert in range(experts):
        place = e.ints((expert,), "expert")
        end = e.add("Gather", [ends, place])
        part = e.add("Slice", [e.name(x), start, end, rows])
        own = e.add("Squeeze", [e.add("Gather", [e.name(weight), place]), rows])
        parts.append(e.add("MatMul", [part, own]))
        start = end
    beyond = e.add("Slice", [e.name(x), start, e.ints((2**62,), "end"), rows])
    last = e.add("Squeeze", [e.add("Gather", [e.name(weight), e.ints((0,), "expert")]), rows])
    zero = e.scalar(0.0, x)
    parts.append(e.add("MatMul", [e.add("Mul", [beyond, zero]), last]))
    e.add("Concat", parts, e.outputs(node), axis=0)


@emitter("resize")
def _resize(node: Node, e: Emission) -> None:
    x, mode = _operand(node, 0), str(node.attributes.get("mode", "nearest"))
    corners, scales = bool(node.attributes.get("align_corners", False)), node.attributes.get("scales")
    if e.since("Resize") < 11:
        raise e.fail(node, "torch's way of placing pixels is not possible")
    places = {"nearest": "asymmetric", "nearest_exact": "half_pixel"}.get(mode, "pytorch_half_pixel")
    if mode == "cubic":
        places = "half_pixel"
    rounding = {"nearest": "floor", "nearest_exact": "round_prefer_ceil"}.get(mode)
    factors, sizes = "", ""
    if isinstance(scales, tuple):
        numbers = [float(s) for s in scales if isinstance(s, int | float)]
        factors = e.weight(Constant(np.array([1, 1, *numbers], np.float32), "f32", (2 + len(numbers),)), "scales")
    else:
        leading = e.add("Slice", [e.add("Shape", [e.name(x)]), e.ints((0,), "start"), e.ints((2,), "end")])
        sizes = e.add("Concat", [leading, e.name(_operand(node, 1))], axis=0)
    e.add(
        "Resize",
        [e.name(x), "", factors, *([sizes] if sizes else [])],
        e.outputs(node),
        mode="nearest" if mode.startswith("nearest") else mode,
        coordinate_transformation_mode="align_corners" if corners else places,
        nearest_mode=rounding,
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )
