"""The border and the steps of a kernel, written node by node: row programs, and what the two kinds share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from planish.codegen.kernel_spec import Kernel, Option, Size, Step, Tensor, padded
from planish.codegen.regions import Bound, Packs
from planish.codegen.row_weights import folded_down, hadamard_base, hadamard_matrix, segment_tables
from planish.codegen.select_sites import Quantised, attribute, is_view, narrow_linear, quantised, vector, width
from planish.ir.graph import Node, Value
from planish.ir.ops.rotation import block_size, signs_of


class Border:
    """The tensors of one kernel, what they hold, and the names of its locals.

    Attributes:
        outputs: the values that are read outside.
        closing: the values that closing steps read.
        known: results that hold one number.
        given: values whose rows are read.
        views: results that are other shapes of what the kernel reads or writes.
    """

    def __init__(self, nodes: Sequence[Node], outputs: Collection[Value], closing: Collection[Value] = ()) -> None:
        self.outputs = set(outputs)
        self.closing = set(closing)
        self.views: dict[Value, Value] = {}
        self._seen_as: dict[Value, list[Value]] = {}
        for node in nodes:
            if is_view(node):
                self._seen_as.setdefault(node.operands[0], []).append(node.result)  # type: ignore[arg-type]
        self.given: set[Value] = set()
        self.bound: dict[str, Bound] = {}
        self.known: dict[Value, int] = {}
        self._tensors: list[Tensor] = []
        self._locals: dict[Value, str] = {}
        self._constants: dict[tuple[object, ...], str] = {}
        self._counts: dict[str, int] = {}

    def fresh(self, base: str) -> str:
        """base, base1, base2, ..."""
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        return f"{base}{count}" if count else base

    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, weights, outputs, scratch."""
        order = ("input", "weight", "output", "scratch")
        return tuple(sorted(self._tensors, key=lambda t: order.index(t.role)))

    def names(self) -> dict[str, str]:
        """Local -> value of the graph."""
        return {local: value.name for value, local in self._locals.items()}

    def add(self, tensor: Tensor, bound: Bound) -> str:
        """Put a tensor on the border."""
        self._tensors.append(tensor)
        self.bound[tensor.name] = bound
        return tensor.name

    def constant(
        self, base: str, dtype: str, shape: tuple[int, ...], make: Callable[[Packs], np.ndarray], how: str, *key: object
    ) -> str:
        """A constant tensor; with `key` the name that the same key had before."""
        if key and key in self._constants:
            return self._constants[key]
        name = self.add(
            Tensor(self.fresh(base), dtype, shape, "weight"), Bound("constant", make=make, how=how)
        )  # fmt: skip
        if key:
            self._constants[key] = name
        return name

    def vector(self, base: str, value: Value, columns: int, offset: float = 0.0) -> str:
        """A float constant beside rows: f32 [columns] or []."""
        held = value.constant
        shape = vector(value, columns)
        assert held is not None and shape is not None
        plus = f" + {offset:g}" if offset else ""
        return self.constant(
            base, "f32", shape, lambda packs: held.wide().reshape(shape) + offset, f"%{value.name}{plus}",
            value, shape, offset,
        )  # fmt: skip

    def rows(self, base: str, value: Value) -> str:
        """The rows of a value that is computed elsewhere; known by one name however often it is read."""
        if value not in self._locals:
            tensor = Tensor(self.fresh(base), "float", ("M", _columns(value)), "input")
            name = self.add(tensor, Bound("rows", value, how=f"the rows of %{value.name}"))
            for shown in self._shapes(value):
                self.given.add(shown)
                self._locals[shown] = name
                if shown is not value and shown in self.outputs:
                    self.views[shown] = value
        return self._locals[value]

    def _shapes(self, value: Value) -> list[Value]:
        """A value and its views in the kernel."""
        found = [value]
        for shown in found:
            found += self._seen_as.get(shown, ())
        return found

    def local(self, value: Value) -> str:
        """The name of a value that the kernel has."""
        return self._locals[value]

    def has(self, value: Value) -> bool:
        """True for a value that has a name."""
        return value in self._locals

    def define(self, value: Value, base: str = "out", name: str = "v") -> str:
        """Name a result: an output of `base`, scratch if closing steps read it, or a local of `name`."""
        shape: tuple[Size, ...] = ("M", _columns(value))
        shapes = self._shapes(value)
        read = [v for v in shapes if v in self.outputs]
        if read:
            local = self.fresh(base)
            self.add(
                Tensor(local, "float", shape, "output"), Bound("rows", read[0], how=f"the rows of %{read[0].name}")
            )
            self.views.update((v, read[0]) for v in read[1:])
        elif self.closing.intersection(shapes):
            local = self.fresh("whole")
            self.add(Tensor(local, "float", shape, "scratch"), Bound("scratch", value))
        else:
            local = self.fresh(name)
        self._locals.update((v, local) for v in shapes)
        return local

    def codes(self, base: str, value: Value, found: Quantised, role: str = "output") -> str:
        """The tensor of an activation's codes."""
        packed = 8 // found.bits
        shape: tuple[Size, ...] = ("M", padded(_columns(value)) // packed)
        name = self.fresh(base)
        less = f" less {found.shift}" if found.shift else ""
        bound = Bound(
            "codes", value, found.bits, found.shift, found.signed, how=f"the codes of %{value.name}{less}"
        )  # fmt: skip
        self._locals[value] = name
        return self.add(Tensor(name, "i8", shape, role, packed), bound)  # type: ignore[arg-type]

    def scales(self, base: str, value: Value, role: str, shift: int = 0, *, grouped: bool = False) -> str:
        """The tensor of an activation's scales, or of its zero points less `shift`; `grouped`: one for each group."""
        shape: tuple[Size, ...] = () if value.rank == 0 else ("M", _columns(value)) if grouped else ("M",)
        name, what = self.fresh(base), "zero points" if base.endswith("zero") else "scales"
        self._locals[value] = name
        less = f" less {shift}" if shift else ""
        return self.add(
            Tensor(name, "i8" if what == "zero points" else "f32", shape, role),  # type: ignore[arg-type]
            Bound("scales", value, shift=shift, grouped=grouped, how=f"the {what} %{value.name}{less}"),
        )


def _columns(value: Value) -> int:
    assert value.shape is not None
    last = value.shape[-1]
    assert isinstance(last, int)
    return last


def shown(row: str, reads: Sequence[str], writes: Sequence[str], options: Mapping[str, Option]) -> str:
    """A step in the form of the IR's text."""
    held = ", ".join(f"{k} = {str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items())
    tail = f" {{{held}}}" if held else ""
    return f"{', '.join(writes)} = {row}({', '.join(r or '_' for r in reads)}){tail}"


def made(row: str, reads: Sequence[str], writes: Sequence[str], **options: Option) -> Step:
    """A step whose source is its own text."""
    return Step(row, tuple(reads), tuple(writes), tuple(options.items()), shown(row, reads, writes, options))


def elementwise(border: Border, node: Node, rows: str) -> Step:
    """The step of an elementwise node.

    Args:
        rows: the base of the names of border tensors that it reads.
    """
    columns = _columns(node.result)
    reads = []
    square = node.op.name == "pow"  # refuses_elementwise: of exponent 2
    for operand in [node.operands[0]] * 2 if square else node.operands:
        assert operand is not None
        if operand.is_constant:
            reads.append(border.vector("by", operand, columns))
        else:
            reads.append(border.rows(rows, operand))
    options: dict[str, Option] = {}
    for key in node.op.attributes:
        held = attribute(node, key)
        assert isinstance(held, str | float | int)
        options[key] = held
    return made("mul" if square else node.op.name, reads, [border.define(node.result)], **options)


def row_step(border: Border, node: Node) -> Step:
    """The step of a node that `planish.codegen.select_sites.refuses_rows` does not refuse, or of a low-rank linear."""
    x = node.operand(0)
    assert x is not None
    match node.op.name:
        case "rms_norm" | "layer_norm":
            return _norm(border, node, x)
        case "hadamard":
            return _hadamard(border, node, x)
        case "gather":
            return _gather(border, node, x)
        case "reassemble":
            return _reassemble(border, node, x)
        case "linear":
            return _down(border, node, x)
        case "quantize" | "dynamic_quantize":
            return _quantise(border, node, x)
        case _:
            return elementwise(border, node, "x")


def _norm(border: Border, node: Node, x: Value) -> Step:
    columns, reads = _columns(x), [border.rows("x", x)]
    offset = attribute(node, "gain_offset") if node.op.name == "rms_norm" else 0.0
    assert isinstance(offset, float | int)
    gain, bias = node.operand(1), node.operand(2)
    if gain is not None:
        reads.append(border.vector("gain", gain, columns, float(offset)))
    elif offset:
        reads.append(border.constant("gain", "f32", (), lambda packs: np.array(float(offset)), f"{offset:g}"))
    else:
        reads.append("")
    reads.append("" if bias is None else border.vector("bias", bias, columns))
    return made(node.op.name, reads, [border.define(node.result)], eps=float(str(attribute(node, "eps"))))


def _hadamard(border: Border, node: Node, x: Value) -> Step:
    signs, order = signs_of(node), block_size(node)
    assert order is not None
    inverse, base = bool(attribute(node, "transpose")), hadamard_base(order)
    reads = [border.rows("x", x), "", ""]
    if signs is not None:
        reads[1] = border.constant("signs", "f32", signs.shape, lambda packs: signs.wide(), "the signs of the rotation")
    dense = hadamard_matrix(order, inverse)
    if dense is not None:
        matrix = dense.numpy()
        how = f"the dense factor of order {base}"
        reads[2] = border.constant("matrix", "i8", matrix.shape, lambda packs: matrix, how, "matrix", order, inverse)
    return made("hadamard", reads, [border.define(node.result)], block=order, transpose=inverse, base=base)


def _gather(border: Border, node: Node, x: Value) -> Step:
    index, count = node.operand(1), _columns(x)
    assert index is not None and index.constant is not None
    held = index.constant
    read = border.rows("x", x)
    name = border.constant(
        "index", "i32", held.shape, lambda packs: held.array().astype(np.int64) % count, f"%{index.name}"
    )
    return made("gather", [read, name], [border.define(node.result, "left")], columns=held.size)


def _reassemble(border: Border, node: Node, x: Value) -> Step:
    index, sizes, weights = (node.operands[i] for i in (1, 2, 3))
    assert index is not None and sizes is not None and weights is not None
    assert index.constant is not None and sizes.constant is not None and weights.constant is not None
    constants, count = (index.constant, sizes.constant, weights.constant), _columns(x)

    def table() -> tuple[np.ndarray, np.ndarray]:
        held = [constants[0].array().astype(np.int64) % count, constants[1].array(), constants[2].wide()]
        places, share = segment_tables(*(torch.from_numpy(np.array(h)) for h in held))
        return places.numpy(), share.numpy()

    read, shape = border.rows("x", x), table()[0].shape
    how = f"of %{index.name}, %{sizes.name}, %{weights.name}"
    names = [
        border.constant("index", "i32", shape, lambda packs: table()[0], f"the places {how}"),
        border.constant("share", "f32", shape, lambda packs: table()[1], f"the weights {how}"),
    ]
    return made("reassemble", [read, *names], [border.define(node.result)], columns=shape[1], terms=shape[0])


def _down(border: Border, node: Node, x: Value) -> Step:
    """A low-rank down; behind a rotation it reads what the rotation does, which its weight takes over."""
    weight, rank = node.operand(1), narrow_linear(node)
    assert weight is not None and weight.constant is not None and isinstance(rank, int)
    held, turned = weight.constant, bool(attribute(node, "transposed"))
    before = x.producer if x.producer is not None and x.producer.op.name == "hadamard" else None
    rotated = before if before is not None and x not in border.given and border.has(x) else None
    source = rotated.operands[0] if rotated is not None else x
    assert source is not None

    def make(packs: Packs) -> np.ndarray:
        matrix = held.wide().T if turned else held.wide()
        if rotated is None:
            return matrix
        signs, order = signs_of(rotated), block_size(rotated)
        assert order is not None
        vector = None if signs is None else torch.from_numpy(np.array(signs.wide()))
        wide = torch.from_numpy(np.array(matrix))
        return folded_down(wide, order, vector, bool(attribute(rotated, "transpose"))).numpy()

    how = f"%{weight.name}" + (" behind the rotation" if rotated is not None else "")
    name = border.constant("down", "float", (rank, _columns(x)), make, how)
    return made("down", [border.rows("x", source), name], [border.define(node.result, "left")], rank=rank)


def _quantise(border: Border, node: Node, x: Value) -> Step:
    found = quantised(node)
    assert isinstance(found, Quantised)
    reads = [border.rows("x", x)]
    if node.op.name == "quantize":
        reads += [static_scale(border, found, "scale"), static_zero(border, found, "zero")]
        writes = [border.codes("codes", node.result, found)]
        return made("quantize_static", reads, writes, **dict(found.options))
    codes, scale, zero = node.results
    grouped = found.granularity == "group"
    writes = [border.codes("codes", codes, found), border.scales("scale", scale, "output", grouped=grouped)]
    if found.zero is not None:
        writes.append(border.scales("zero", zero, "output", found.shift))
    else:
        border.known[zero] = found.shift
    return made(f"quantize_{found.granularity}", reads, writes, **dict(found.options))


def static_scale(border: Border, found: Quantised, base: str) -> str:
    """The calibrated scale of an activation, f32 []."""
    held = found.scale.constant
    assert held is not None
    return border.constant(base, "f32", (), lambda packs: held.wide(), f"%{found.scale.name}", found.scale)


def static_zero(border: Border, found: Quantised, base: str) -> str:
    """The calibrated zero point of an activation, i8 [], or nothing."""
    if found.zero is None or found.zero.constant is None:
        return ""
    held, shift = found.zero.constant, found.shift
    return border.constant(
        base, "i8", (), lambda packs: held.array().astype(np.int64) - shift, f"%{found.zero.name} less {shift}",
        found.zero,
    )  # fmt: skip


def prologue(nodes: Sequence[Node], outputs: Collection[Value]) -> tuple[Kernel, Border]:
    """The kernel of a row program: nodes in the order of the graph."""
    border = Border(nodes, outputs)
    inside = {v for node in nodes for v in node.results}
    first = next(v for n in nodes for v in n.operands if width(v) is not None and not _constant(v) and v not in inside)
    assert first is not None
    row = border.rows("x", first)
    steps = tuple(row_step(border, node) for node in nodes if not is_view(node))
    kernel = Kernel("prologue", _columns(first), 0, border.tensors(), steps, row=row, names=border.names())
    return kernel, border


def _constant(value: Value | None) -> bool:
    return value is None or value.is_constant
