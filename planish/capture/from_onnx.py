"""Capture an ONNX model, losslessly.

Every ONNX node becomes one IR node: a canonical op where `onnx_ops` has a converter that keeps the
function to the bit, else an opaque node that is written back as it was. Constant nodes and
initialisers become constants. What has no place in the IR (producer, documentation, functions, ...)
is kept in `Graph.meta`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import onnx
from onnx import AttributeProto, ModelProto, NodeProto

from planish.capture import onnx_file, onnx_ops
from planish.capture.onnx_file import ExternalData
from planish.capture.onnx_proto import (
    DEFAULT_DOMAIN,
    attribute_of,
    captured_names,
    constant_of,
    dialect,
    refine,
    type_of,
)
from planish.capture.onnx_view import View
from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError, nearest
from planish.ir.graph import Attribute, Blob, Graph, Node, Value
from planish.ir.onnx_attributes import ABSENT, RESERVED
from planish.ir.types import UNKNOWN, Type


def from_onnx(
    model: str | Path | ModelProto,
    *,
    inline_functions: bool = True,
    canonical: bool = True,
    base_dir: str | Path | None = None,
) -> Graph:
    """Capture an ONNX model.

    Args:
        model: a path, or a model in memory (it is not changed).
        inline_functions: replace calls of model-local functions by their bodies, so that analyses see
            through them; otherwise calls stay opaque and the functions are kept.
        canonical: convert nodes to canonical ops where that is exact; False keeps every node opaque.
        base_dir: the folder of external data, for a model in memory; a path has its own.

    Raises:
        InvalidModelError: the file or the model is not valid; the message says what and where.
    """
    if isinstance(model, ModelProto):
        proto, resolve = model, ExternalData(None if base_dir is None else Path(base_dir))
        if not proto.HasField("graph"):
            raise InvalidModelError("the model holds no graph")
    else:
        path = Path(model)
        proto = onnx_file.read(path)
        resolve = ExternalData(path.parent, path.resolve().parent)
    onnx_file.check_text(proto)
    work, weights = onnx_file.detach_weights(proto, resolve)
    if inline_functions and work.functions:
        work = onnx_file.inline_functions(work)
    del proto
    return _Capture(work, weights, resolve, canonical).run()


@cache
def schema_of(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    """The schema of an operator at an opset version; None if there is none."""
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def _known_operators() -> frozenset[str]:
    return frozenset(s.name for s in onnx.defs.get_all_schemas() if s.domain == "")


class _Capture:
    """One run of the capture."""

    def __init__(self, model: ModelProto, weights: dict[str, Constant], resolve: ExternalData, canonical: bool) -> None:
        self.model = model
        self.source = model.graph
        self.resolve = resolve
        self.canonical = canonical
        self.weights = weights  # by name, whether in the graph yet or not
        self.folded: set[str] = set()  # weights that a converter turned into attributes
        self.graph = Graph(self.source.name)
        self.values: dict[str, Value] = {}
        self.declared = {v.name: type_of(v.type) for v in self.source.value_info}
        self.types: dict[str, Type] = {}
        self.functions = {(dialect(f.domain), f.name, f.overload) for f in model.functions}
        self.opsets: dict[str, int] = {}
        self.read: set[str] = set()  # every name that something reads
        self.taken: set[str] = set()  # every name of the model

    def run(self) -> Graph:
        self._versions()
        self._names()
        self.types = onnx_file.inferred_types(self.model)
        self._inputs()
        nodes = self._sorted()
        for index, proto in enumerate(nodes):
            try:
                self._node(proto)
            except InvalidModelError as error:
                where = _label(proto, index)
                if error.where is not None:
                    where += f" ({error.where})"
                raise InvalidModelError(error.what, where=where, hint=error.hint) from error
        for name in self.weights:
            if name not in self.values and name not in self.folded:
                self.value(name)
        self._outputs()
        meta = self.graph.meta
        meta[onnx_file.META_IR_VERSION] = self.model.ir_version
        meta[onnx_file.META_OPSETS] = tuple((o.domain, o.version) for o in self.model.opset_import)
        meta[onnx_file.META_REST] = onnx_file.pack_rest(self.model)
        return self.graph

    # -- before the nodes ------------------------------------------------------------------------

    def _versions(self) -> None:
        for opset in self.model.opset_import:
            name = dialect(opset.domain)
            if opset.version < 1:
                raise InvalidModelError(f"opset of domain '{name}': version {opset.version}; expected >= 1")
            if self.opsets.setdefault(name, opset.version) != opset.version:
                raise InvalidModelError(f"opset of domain '{name}': imported in two versions")
        if not self.model.opset_import and self.model.ir_version < 3:
            self.opsets[DEFAULT_DOMAIN] = 1
        version, newest = self.opsets.get(DEFAULT_DOMAIN, 0), onnx.defs.onnx_opset_version()
        if version > newest:
            warnings.warn(
                f"opset {version} is newer than {newest}, the newest that the installed onnx knows: "
                "every node stays opaque",
                stacklevel=4,
            )

    def _names(self) -> None:
        """Check that each name is defined once and that what is read is defined."""
        source = self.source
        if not source.node and not source.output:
            raise InvalidModelError("empty graph: no nodes and no outputs")
        if not source.output:
            raise InvalidModelError("the graph has no outputs")
        defined: set[str] = set()
        for kind, names in (
            ("input", [v.name for v in source.input]),
            ("initialiser", [t.values.name for t in source.sparse_initializer]),
            ("result", [o for n in source.node for o in n.output if o]),
        ):
            for name in names:
                if not name:
                    raise InvalidModelError(f"an {kind} of the graph has no name")
                if name in defined:
                    raise InvalidModelError(f"value '{name}': defined twice")
                defined.add(name)
        inputs = {v.name for v in source.input}
        for name in self.weights:
            if name in defined and name not in inputs:
                raise InvalidModelError(f"value '{name}': defined twice")
        defined |= self.weights.keys()
        outputs: set[str] = set()
        for index, node in enumerate(source.node):
            for name in (*node.input, *captured_names(node)):
                if name and name not in defined:
                    raise InvalidModelError(
                        f"value '{name}': read but never defined",
                        where=_label(node, index),
                        hint=nearest(name, defined),
                    )
                self.read.add(name)
        for output in source.output:
            if output.name not in defined:
                raise InvalidModelError(f"output '{output.name}': never defined", hint=nearest(output.name, defined))
            if output.name in outputs:
                raise InvalidModelError(f"output '{output.name}': listed twice")
            outputs.add(output.name)
        self.read |= outputs
        self.taken = defined

    def _inputs(self) -> None:
        listed = self.model.ir_version < 4  # initialisers had to be listed as inputs, and are constants
        for info in self.source.input:
            default = self.weights.get(info.name)
            if default is not None and listed:
                continue
            type_ = type_of(info.type)
            if default is not None:
                type_ = refine(type_, default.type)
                self.weights.pop(info.name)
            self.values[info.name] = self.graph.add_input(info.name, type_, default)

        for sparse in self.source.sparse_initializer:
            name = sparse.values.name
            proto = onnx.helper.make_node("Constant", [], [name])
            proto.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse)
            self._opaque(proto, ())

    def _sorted(self) -> Sequence[NodeProto]:
        """The nodes so that each value is made before it is read: as they stand if that is so."""
        ready = set(self.values) | self.weights.keys()
        nodes = list(self.source.node)
        reads = [{n for n in (*p.input, *captured_names(p)) if n} for p in nodes]
        made = set(ready)
        in_order = True
        for proto, names in zip(nodes, reads, strict=True):
            if not names <= made:
                in_order = False
                break
            made.update(proto.output)
        if in_order:
            return nodes
        waiting = [len(names - ready) for names in reads]
        readers: dict[str, list[int]] = {}
        for index, names in enumerate(reads):
            for name in names - ready:
                readers.setdefault(name, []).append(index)
        order: list[int] = []
        queue = [i for i, count in enumerate(waiting) if count == 0]
        for index in queue:
            order.append(index)
            for name in nodes[index].output:
                for reader in readers.get(name, ()):
                    waiting[reader] -= 1
                    if waiting[reader] == 0:
                        queue.append(reader)
        if len(order) < len(nodes):
            stuck = next(i for i, count in enumerate(waiting) if count > 0)
            raise InvalidModelError("the graph has a cycle", where=_label(nodes[stuck], stuck))
        return [nodes[i] for i in order]

    # -- nodes -----------------------------------------------------------------------------------

    def value(self, name: str) -> Value | None:
        """The value of a name, None for the empty one; a weight enters the graph when it is first read."""
        if not name:
            return None
        value = self.values.get(name)
        if value is None:
            value = self.values[name] = self.graph.add_constant(name, self.weights[name])
        return value

    def constant(self, constant: Constant, hint: str) -> Value:
        """A new constant, for an operand that used to be an attribute."""
        name = self._fresh(hint)
        value = self.values[name] = self.graph.add_constant(name, constant)
        return value

    def peek(self, name: str) -> Constant | None:
        """The data of a name that is a constant."""
        value = self.values.get(name)
        if value is not None:
            return value.constant if value.is_constant else None
        return self.weights.get(name)

    def type(self, name: str) -> Type:
        value = self.values.get(name)
        if value is not None:
            return value.type
        return self.weights[name].type if name in self.weights else UNKNOWN

    def _fresh(self, hint: str) -> str:
        name, count = hint, 0
        while name in self.taken:
            count += 1
            name = f"{hint}_{count}"
        self.taken.add(name)
        return name

    def _node(self, proto: NodeProto) -> None:
        domain = dialect(proto.domain)
        schema = None
        is_call = (domain, proto.op_type, proto.overload) in self.functions
        if not is_call:
            schema = self._schema(proto, domain)
        seen: set[str] = set()
        for attribute in proto.attribute:
            if attribute.name in seen:
                raise InvalidModelError(f"attribute '{attribute.name}': given twice")
            seen.add(attribute.name)
        if self.canonical and schema is not None and domain == DEFAULT_DOMAIN and fits(proto, schema):
            held = constant_of_node(proto)
            if held is not None:
                self.weights[proto.output[0]] = held
                return
            if self._canonical(proto, schema.since_version):
                return
        self._opaque(proto, captured_names(proto))

    def _schema(self, proto: NodeProto, domain: str) -> onnx.defs.OpSchema | None:
        version = self.opsets.get(domain)
        if domain != DEFAULT_DOMAIN:
            return None if version is None else schema_of(proto.op_type, domain, version)
        if version is None:
            raise InvalidModelError("the model imports no opset of ONNX's default domain")
        schema = schema_of(proto.op_type, "", version)
        newest = onnx.defs.onnx_opset_version()
        if version > newest:
            return None
        if schema is None:
            raise InvalidModelError(
                f"operator '{proto.op_type}': unknown in opset {version}",
                hint=nearest(proto.op_type, _known_operators()),
            )
        return schema

    def _canonical(self, proto: NodeProto, since: int) -> bool:
        """Convert a node to a canonical op; False if there is no exact converter for it."""
        extra = [o for o in proto.output[1:] if o and o in self.read]
        view = View(proto, since, self, only_first=not extra)
        made = onnx_ops.convert(view)
        if made is None:
            return False
        results = [o for o in proto.output if o] if made.results is None else list(proto.output[: made.results])
        if not all(results):
            return False
        row = ops.get(made.op)
        needed = [i for i, param in enumerate(row.params) if not (param.optional or param.variadic)]
        if any(i >= len(made.operands) or made.operands[i] is None for i in needed):
            return False
        node = Node(row, [view.resolve(o) for o in made.operands], made.attributes)
        inferred = node.op.infer(node)
        if len(inferred) != len(results):
            return False
        types = [refine(t, self._known(name)) for t, name in zip(inferred, results, strict=True)]
        self._append(node, results, types, proto)
        self.folded |= {
            n for n in proto.input if n and n not in self.values and n in self.weights and n not in self.folded
        }
        return True

    def _opaque(self, proto: NodeProto, captures: tuple[str, ...]) -> None:
        domain = dialect(proto.domain)
        attributes: dict[str, Attribute] = {}
        for attribute in proto.attribute:
            if attribute.name in RESERVED:
                whole = attribute.SerializeToString(deterministic=True)
                attributes[f"onnx.{attribute.name}"] = Blob("onnx.AttributeProto", whole)
            else:
                attributes[attribute.name] = attribute_of(attribute, self.resolve)
        if captures:
            attributes["captures"] = captures
        if domain in self.opsets:
            attributes["onnx_opset"] = self.opsets[domain]
        if proto.overload:
            attributes["onnx_overload"] = proto.overload
        operands = [self.value(n) for n in (*proto.input, *captures)]
        node = Node(ops.get(f"{domain}::{proto.op_type}"), operands, attributes)
        names = [o or self._fresh(f"{proto.op_type}_unused") for o in proto.output]
        types = [self._known(o) if o else ABSENT for o in proto.output]
        self._append(node, names, types, proto)

    def _known(self, name: str) -> Type:
        return self.types.get(name, UNKNOWN)

    def _append(self, node: Node, names: list[str], types: list[Type], proto: NodeProto) -> None:
        made = self.graph.append(node.op, node.operands, node.attributes, names=names, types=types, source=proto.name)
        self.values.update((v.name, v) for v in made.results)

    def _outputs(self) -> None:
        for output in self.source.output:
            value = self.value(output.name)
            if value is not None:
                self.graph.add_output(output.name, value)


def constant_of_node(proto: NodeProto) -> Constant | None:
    """The constant of a Constant node that an inlined function left behind."""
    tensor = onnx_file.constant_node(proto)
    return None if tensor is None else constant_of(tensor)


def fits(proto: NodeProto, schema: onnx.defs.OpSchema) -> bool:
    """True if a node has the attributes and the arity that its schema wants."""
    known = schema.attributes
    for attribute in proto.attribute:
        if attribute.ref_attr_name or attribute.name not in known:
            return False
        if _number(known[attribute.name]) != attribute.type:
            return False
    given = {a.name for a in proto.attribute}
    if any(a.required and name not in given for name, a in known.items()):
        return False
    inputs, outputs = len(proto.input), len(proto.output)
    return schema.min_input <= inputs <= schema.max_input and schema.min_output <= outputs <= schema.max_output


def _number(attribute: onnx.defs.OpSchema.Attribute) -> int:
    """The kind of an attribute, as a number of AttributeProto."""
    return int(attribute.type.value)  # type: ignore[attr-defined]


def _label(proto: NodeProto, index: int) -> str:
    """How a message names a node."""
    domain = f"{proto.domain}::" if proto.domain else ""
    name = f" '{proto.name}'" if proto.name else ""
    return f"node {index}{name}: {_join(proto.output)} = {domain}{proto.op_type}({_join(proto.input)})"


def _join(names: Iterable[str]) -> str:
    listed = [f"%{n}" for n in names]
    return ", ".join(listed if len(listed) <= 6 else [*listed[:5], "..."])
