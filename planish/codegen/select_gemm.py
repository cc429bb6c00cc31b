"""The kernel of linears that read one activation: products, branches, epilogue on a tile, closing steps on rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planish.codegen.kernel_spec import Activation, Branch, Kernel, Product, Tensor, Weight, half_of, padded
from planish.codegen.regions import Bound, Packs
from planish.codegen.select_rows import Border, elementwise, row_step
from planish.codegen.select_sites import (
    BINARY,
    UNARY,
    Left,
    WeightKind,
    attribute,
    is_view,
    quantised,
    weight_tensor,
    weight_value,
    width,
)
from planish.ir.graph import Node, Value

TILE = 128  # columns that every tile has, or a divisor of them


@dataclass(eq=False)
class Linear:
    """A quantised linear that a kernel computes.

    Attributes:
        branches: each the linear that reads the narrow left and the sum that takes it up, in order.
        split: of a part of a merged linear: the node that parts its outputs; else None.
        first: the first of its outputs among those of the merged linear.
    """

    node: Node
    left: Left
    weight: WeightKind
    columns: int
    outputs: int
    branches: list[tuple[Node, Node]] = field(default_factory=list)
    split: Node | None = None
    first: int = 0

    @property
    def result(self) -> Value:
        """What the product makes, its branches included."""
        if self.split is not None:
            return next(v for v, first in split_results(self.split) if first == self.first)
        return self.branches[-1][1].result if self.branches else self.node.result

    @property
    def nodes(self) -> list[Node]:
        """The linear, the nodes of its branches, and what parts its result."""
        nodes = [self.node, *(node for pair in self.branches for node in pair)]
        return nodes if self.split is None else [*nodes, self.split]

    @property
    def rows(self) -> slice:
        """Its rows among those of the weight."""
        return slice(self.first, self.first + self.outputs)

    def parts(self) -> list[Linear]:
        """The linears that it was merged of, if its result is read by a split of its outputs alone."""
        users = list(dict.fromkeys(self.result.users))
        if self.split is not None or len(users) != 1 or users[0].op.name != "split":
            return []
        found = split_results(users[0])
        sizes = [width(value) for value, _ in found]
        if any(size is None for size in sizes) or sum(size or 0 for size in sizes) != self.outputs:
            return []
        return [
            replace(self, outputs=size or 0, split=users[0], first=first)
            for size, (_, first) in zip(sizes, found, strict=True)
        ]


def split_results(node: Node) -> list[tuple[Value, int]]:
    """The results of a split of the last axis, each with the column at which it begins; none of another axis."""
    x = node.operand(0)
    if x is None or x.rank is None or attribute(node, "axis") not in (x.rank - 1, -1):
        return []
    found, begin = [], 0
    for value in node.results:
        size = width(value)
        if size is None:
            return []
        found.append((value, begin))
        begin += size
    return found


def gemm(
    linears: Sequence[Linear], epilogue: Sequence[Node], program: Sequence[Node], outputs: Collection[Value]
) -> tuple[Kernel, Border]:
    """The kernel of one or more linears and what is fused behind them.

    Args:
        epilogue: elementwise nodes, in the order of the graph.
        program: the nodes of a row program that reads what the epilogue makes, in the order of the graph: run on
            tiles if all of them can, else on rows.
        outputs: the values that are read outside.
    """
    on_tiles, on_rows = [*epilogue], [*program]
    if all(fits_tile(node) for node in program):
        on_tiles, on_rows = on_tiles + on_rows, []
    inside = {v for node in on_rows for v in node.results}
    edge = {v for n in on_rows for v in n.operands if v is not None and v not in inside}
    border = Border([*epilogue, *program], outputs, edge)
    first = linears[0]
    activation = _activation(border, first.left, first.columns)
    products = tuple(_product(border, linear, activation) for linear in linears)
    steps = tuple(
        elementwise(border, n, "residual") if n.op.name in UNARY or n.op.name in BINARY else row_step(border, n)
        for n in on_tiles
        if not is_view(n)
    )
    closing = tuple(row_step(border, node) for node in on_rows if not is_view(node))
    kernel = Kernel(
        "gemm", first.columns, first.outputs, border.tensors(), steps, closing,
        activation=activation, products=products, names=border.names(),
    )  # fmt: skip
    return kernel, border


def fits_tile(node: Node) -> bool:
    """True for elementwise nodes and for quantising with one scale, or with scales of groups that lie in a tile."""
    if node.op.name in UNARY or node.op.name in BINARY or is_view(node):
        return True
    found = quantised(node) if node.op.name in ("quantize", "dynamic_quantize") else ""
    if isinstance(found, str):
        return False
    return node.op.name == "quantize" or (found.granularity == "group" and found.group <= TILE)


def _activation(border: Border, left: Left, columns: int) -> Activation:
    if not left.is_codes:
        return Activation("float", border.rows("a", left.value))
    made = left.value.producer
    assert made is not None and left.scale is not None
    found = quantised(made)
    assert not isinstance(found, str)
    codes = border.codes("a", left.value, found, "input")
    zero = ""
    if left.scale.constant is not None:
        from planish.codegen.select_rows import static_scale, static_zero

        scale, zero = static_scale(border, found, "a_scale"), static_zero(border, found, "a_zero")
    else:
        scale = border.scales("a_scale", left.scale, "input", grouped=left.granularity == "group")
        if left.zero is not None:
            zero = border.scales("a_zero", left.zero, "input", left.shift)
    return Activation("codes", codes, left.bits, left.granularity or "tensor", left.group, scale, zero, left.signed)


def _product(border: Border, linear: Linear, activation: Activation) -> Product:
    kind, node = linear.weight, linear.node
    prefix = border.fresh("weight")
    rows, columns, chosen = linear.outputs, linear.columns, linear.rows
    held, _ = weight_value(node)
    name = held.name if held is not None else ""

    def packed(key: str) -> Callable[[Packs], np.ndarray]:
        axis = 0 if key in ("codes", "ids") else -1
        return lambda packs: np.moveaxis(np.moveaxis(packs.of(node).array(key), axis, 0)[chosen], 0, axis)

    def constant(suffix: str, dtype: str, shape: tuple[int, ...], key: str, packing: int = 1) -> str:
        bound = Bound("constant", make=packed(key), how=f"{key} of %{name} in the container triton")
        tensor = Tensor(f"{prefix}_{suffix}" if suffix else prefix, dtype, shape, "weight", packing)
        return border.add(tensor, bound)

    per = 8 // kind.bits
    groups = -(-columns // kind.group) if kind.group else 0
    scales = (*((kind.clusters,) if kind.clusters else ()), *((groups,) if groups else ()), rows)
    codes = constant("", "i8", (rows, padded(columns) // per), "codes", per)
    ids = ""
    if kind.clusters:
        share = 8 if kind.clusters == 2 else 4
        ids = constant("ids", "u8", (rows, padded(columns) // share), "ids", share)
    scale = constant("scale", kind.scale, scales, "scale")
    zero = ""
    if kind.zero:
        zero = constant("zero", "f32" if kind.zero == "float" else "i8", scales, "zero")
    sums = ""
    if activation.zero:
        sums = border.add(
            Tensor(f"{prefix}_sums", "f32", (rows,), "weight"),
            Bound("constant", make=_sums(linear), how=f"the sums of the rows of %{name}"),
        )
    weight = Weight(
        kind.decoder, codes, scale, zero, ids, sums, kind.group, 0 if per == 1 else half_of(kind.bits), kind.clusters
    )
    branches = []
    for up, _ in linear.branches:
        left, right = up.operand(0), up.operand(1)
        assert left is not None and right is not None and right.constant is not None
        branches.append(_branch(border, up, left, right, chosen))
    bias = node.operand(2)
    addend = "" if bias is None else _bias(border, bias, linear)
    result = border.define(linear.result, name="acc")
    spelled = f"{result} = linear({activation.codes}, {codes}{', ' + addend if addend else ''})"
    spelled += "".join(f" + linear({b.left}, {b.right})" for b in branches)
    return Product(weight, result, tuple(branches), addend, spelled)


def _sums(linear: Linear) -> Callable[[Packs], np.ndarray]:
    """The sum of each row's numbers: what a zero point of the activation takes away."""

    def make(packs: Packs) -> np.ndarray:
        total: np.ndarray = weight_tensor(linear.node).dequantize()[linear.rows].sum(1)
        return total

    return make


def _bias(border: Border, bias: Value, linear: Linear) -> str:
    """The bias of a linear, or of a part of a merged one."""
    if linear.split is None or bias.constant is None or bias.constant.size == 1:
        return border.vector("bias", bias, linear.outputs)
    held, rows = bias.constant, linear.rows
    return border.constant(
        "bias", "f32", (linear.outputs,), lambda packs: held.wide().reshape(-1)[rows], f"%{bias.name}, its part"
    )


def _branch(border: Border, up: Node, left: Value, right: Value, chosen: slice) -> Branch:
    held, turned = right.constant, bool(attribute(up, "transposed"))
    assert held is not None and left.shape is not None
    rank, rows = left.shape[-1], chosen.stop - chosen.start
    assert isinstance(rank, int)

    def make(packs: Packs) -> np.ndarray:
        return (held.wide().T if turned else held.wide())[chosen]

    name = border.constant("up", "float", (rows, rank), make, f"%{right.name}", right, chosen.start)
    return Branch(border.rows("left", left), name, rank)
