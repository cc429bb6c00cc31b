"""One emission of ONNX: names, weights, nodes, and the table of emitters that write canonical ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from planish.capture.onnx_file import META_IR_VERSION, opsets_of, unpack_rest
from planish.capture.onnx_proto import (
    DEFAULT_DOMAIN,
    captured_names,
    defined_names,
    dialect,
    domain_of,
    rename_free,
    subgraphs,
    type_of,
)
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Blob, Graph, Node, Value
from planish.ir.onnx_attributes import ABSENT, attribute_proto, type_proto
from planish.ir.types import TensorType

DEFAULT_OPSET = 21  # for graphs that did not come from ONNX
DEFAULT_IR_VERSION = 10
OLDEST_OPSET = 7  # before it, operands broadcast only where an attribute says so
AXIS_OPSET = 13  # of QuantizeLinear and DequantizeLinear with a scale per channel
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
TORCH_CAN = "the torch target can: planish.to_torch(graph)"

Emitter = Callable[[Node, "Emission"], None]
_emitters: dict[str, Emitter] = {}
_renamed_attributes = frozenset({"captures", "onnx_opset", "onnx_overload"})


def emitter(*names: str) -> Callable[[Emitter], Emitter]:
    """Register how canonical ops are written. The emitter adds nodes to the Emission it is given."""

    def register(function: Emitter) -> Emitter:
        _emitters.update(dict.fromkeys(names, function))
        return function

    return register


@cache
def _schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def check_opset(opset: int, own: int | None = None) -> None:
    """An error if there is no such version of ONNX's default domain, or one that planish does not write.

    Args:
        own: the version that the graph came with, which is written whatever it is.
    """
    newest = onnx.defs.onnx_opset_version()
    if opset != own and not OLDEST_OPSET <= opset <= newest:
        why = "is not written" if 1 <= opset <= newest else "unknown"
        raise PlanishError(f"opset {opset}: {why}; expected {OLDEST_OPSET} to {newest}")


def check_target(target: str) -> None:
    """An error if there is no such target."""
    if target not in ("onnx", "ort"):
        raise PlanishError(f"target '{target}': unknown; expected onnx or ort")


class Emission:
    """One emission: what emitters add nodes and weights to.

    Attributes:
        opset: the version of ONNX's default domain: what was asked for, else the graph's own, raised where
            quantised nodes want it and every node that planish does not know means the same there.
        target: "onnx" or "ort".
        weights: the initialisers by name.
        names: the emitted name of each value.
    """

    def __init__(self, graph: Graph, *, opset: int | None = None, target: str = "onnx") -> None:
        check_target(target)
        self.graph = graph
        self.target = target
        self.rest = unpack_rest(graph)
        self.imports = {domain_of(dialect(d)): v for d, v in opsets_of(graph).items()}
        self.opset = opset or self.imports.get("") or DEFAULT_OPSET
        if opset is not None:
            check_opset(opset, self.imports.get(""))
        least = least_opset(graph)
        if opset is None and self.opset < least and (self.opset < AXIS_OPSET or self._may_move_to(least)):
            opset = self.opset = least
        self.imported = frozenset(self.imports)
        self.imports[""] = self.opset
        version = graph.meta.get(META_IR_VERSION)
        self.ir_version = version if isinstance(version, int) else DEFAULT_IR_VERSION
        if opset is not None:
            self.ir_version = max(self.ir_version, _least_ir_version(opset))
        self.weights: dict[str, Constant] = {}
        self.nodes: list[NodeProto] = []
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self._serials: dict[str, int] = {}
        self._shared: dict[object, str] = {}
        self._copies: list[tuple[str, Value]] = []  # outputs that need an Identity
        self._listed = {v.name for v in self.rest.graph.input}
        self._stubs = {n.output[0]: n for n in self.rest.graph.node}
        self._documents = {t.name: t for t in self.rest.graph.initializer}
        self._source = ""
        self._sources: set[str] = set()

    # -- for emitters ----------------------------------------------------------------------------

    def name(self, value: Value | None) -> str:
        """The emitted name of a value; empty for an absent one."""
        return "" if value is None else self.names[value]

    def outputs(self, node: Node) -> list[str]:
        """The emitted names of a node's results."""
        return ["" if r.type == ABSENT else self.names[r] for r in node.results]

    def fresh(self, hint: str) -> str:
        """A name that nothing in the model has, subgraphs included."""
        name = hint
        while name in self.taken:
            self._serials[hint] = self._serials.get(hint, 0) + 1
            name = f"{hint}_{self._serials[hint]}"
        self.taken.add(name)
        return name

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | str | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        hint: str = "",
        **more: Attribute,
    ) -> str:
        """Add a node; the name of its first output. Attributes that are None are left out.

        Raises:
            PlanishError: the opset has no such operator, or not with these operands and attributes.
        """
        if outputs is None:
            outputs = [self.fresh(hint or op_type.lower())]
        elif isinstance(outputs, str):
            outputs = [outputs]
        given = {key: value for key, value in {**(attributes or {}), **more}.items() if value is not None}
        if domain == "":
            self._check_form(op_type, inputs, given)
        if domain and domain not in self.imports:
            self.imports[domain] = 1
        inputs = list(inputs)
        while inputs and not inputs[-1]:
            inputs.pop()
        proto = NodeProto(op_type=op_type, input=inputs, output=outputs)
        if domain:
            proto.domain = domain
        if self._source and self._source not in self._sources:
            proto.name = self._source  # the first node that came from a node gets its name
            self._sources.add(self._source)
        self._source = ""
        for key, value in given.items():
            proto.attribute.append(attribute_proto(key, value))
        self.nodes.append(proto)
        return outputs[0]

    def _check_form(self, op_type: str, inputs: Sequence[str], attributes: Mapping[str, Attribute]) -> None:
        schema, lack = _schema(op_type, "", self.opset), ""
        if schema is None:
            lack = "unknown"
        elif unknown := next((key for key in attributes if key not in schema.attributes), ""):
            lack = f"has no attribute '{unknown}'"
        elif len(inputs) > schema.max_input:
            lack = f"has {schema.max_input} operands, not {len(inputs)},"
        if lack:
            raise PlanishError(f"operator '{op_type}': {lack} in opset {self.opset}", hint="write at a higher opset")

    def weight(self, constant: Constant, hint: str = "const", *, key: object = None) -> str:
        """Add a weight; equal small ones, and those of one `key`, are shared."""
        if key is None and constant.size <= 64 and constant.dtype != "str":
            key = (constant.dtype, constant.shape, constant.array().tobytes())
        if key is not None and key in self._shared:
            return self._shared[key]
        name = self._put(self.fresh(hint), constant)
        if key is not None:
            self._shared[key] = name
        return name

    def ints(self, values: Iterable[int], hint: str = "ints") -> str:
        """A one-dimensional int64 weight."""
        return self.weight(Constant.of(np.array(list(values), np.int64), "i64"), hint)

    def scalar(self, value: float, like: Value, hint: str = "scalar") -> str:
        """A scalar weight of the dtype of a value."""
        dtype = like.dtype or "f32"
        return self.weight(Constant(np.array(value, np.float64), dtype, ()), hint)

    def reduce(
        self,
        op_type: str,
        x: str,
        axes: tuple[int, ...] | None,
        keepdims: bool,
        outputs: Sequence[str] | None = None,
    ) -> str:
        """Add a reduction; its axes are an operand or an attribute, as the opset wants."""
        keep = None if keepdims else 0
        if self.since(op_type) >= (13 if op_type == "ReduceSum" else 18):
            names = [x] if axes is None else [x, self.ints(axes, "axes")]
            return self.add(op_type, names, outputs, keepdims=keep)
        return self.add(op_type, [x], outputs, keepdims=keep, axes=axes)

    def since(self, op_type: str) -> int:
        """The version in which an operator got its form at this opset; 0 if the opset has none."""
        schema = _schema(op_type, "", self.opset)
        return 0 if schema is None else schema.since_version

    def fail(self, node: Node, why: str) -> PlanishError:
        """The error that a node cannot be written."""
        return PlanishError(f"op '{node.op.name}': {why} in ONNX opset {self.opset}", where=str(node), hint=TORCH_CAN)

    def _may_move_to(self, opset: int) -> bool:
        """True if every node that planish does not know means the same at another opset."""
        own, imports = self.opset, self.imports
        self.opset, self.imports = opset, {**imports, "": opset}
        try:
            self.check_versions()
        except PlanishError:
            return False
        finally:
            self.opset, self.imports = own, imports
        return True

    def check_versions(self) -> None:
        """Check that every node that planish does not know means the same at this opset.

        Raises:
            PlanishError: one does not.
        """
        for node in self.graph.nodes:
            if node.op.opaque:
                dialect_name, _, op_type = node.op.name.rpartition("::")
                self._check_version(node, op_type, domain_of(dialect_name))

    # -- the model -------------------------------------------------------------------------------

    def model(self) -> ModelProto:
        """The model without its initialisers, which are in `weights`."""
        import planish.codegen.onnx_ops  # noqa: F401  registers the emitters

        self._assign_names()
        for value in self.graph.constants:
            self._put(self.names[value], value.constant)
        for node in self.graph.nodes:
            first = len(self.nodes)
            self._source = node.source
            if node.op.opaque:
                self._opaque(node)
            elif node.op.name in _emitters:
                _emitters[node.op.name](node, self)
            else:
                raise PlanishError(f"op '{node.op.name}': has no ONNX form", where=str(node), hint=TORCH_CAN)
            self._document(self.nodes[first:] if self._stubs else [])
        self._public_outputs()
        self._drop_unread()
        self._widen()
        model = ModelProto()
        model.CopyFrom(self.rest)
        model.ir_version = self.ir_version
        if not self.rest.HasField("graph") and not model.producer_name:
            model.producer_name = "planish"
        graph = model.graph
        for field in ("node", "initializer", "input", "output", "value_info", "quantization_annotation"):
            graph.ClearField(field)
        graph.name = self.graph.name
        self._unique_names()
        graph.node.extend(self.nodes)
        self._value_infos(graph)
        for annotation in self.rest.graph.quantization_annotation:
            if annotation.tensor_name in self.taken:
                graph.quantization_annotation.append(annotation)
        order = [domain_of(dialect(d)) for d in opsets_of(self.graph)] or [""]
        for domain in dict.fromkeys((*order, *self.imports)):
            model.opset_import.add(domain=domain, version=self.imports[domain])
        return model

    def _unique_names(self) -> None:
        """Several nodes may come from one: ONNX Runtime wants their names distinct."""
        seen: set[str] = set()
        for proto in self.nodes:
            serial, stem = 1, proto.name
            while proto.name in seen:
                serial += 1
                proto.name = f"{stem}_{serial}"
            if stem:
                seen.add(proto.name)

    def _put(self, name: str, constant: Constant | None) -> str:
        """Make a constant an initialiser, or a Constant node where initialisers must be inputs (IR < 4)."""
        if constant is None:
            return name
        if self.ir_version < 4 and name not in self._listed:
            proto = NodeProto(op_type="Constant", output=[name])
            proto.attribute.append(attribute_proto("value", constant))
            self.nodes.append(proto)
        else:
            self.weights[name] = constant
        return name

    def _assign_names(self) -> None:
        """Each value's own name, except that results take the public names of the outputs they are."""
        inner: set[str] = set()
        for node in self.graph.nodes:
            for attribute in node.attributes.values():
                for graph in _graphs(attribute):
                    inner |= defined_names(graph, nested=True)
        public = {v.name for v in self.graph.inputs} | {name for name, _ in self.graph.outputs}
        self.taken = inner | public | set(self.graph.values)
        for value in self.graph.inputs:
            self.names[value] = value.name
        for name, value in self.graph.outputs:
            held = self.graph.values.get(name)
            if held is not None and held.is_input and held is not value:
                raise PlanishError(f"output '{name}': an input has that name, and is another value")
            if value not in self.names and (value.producer is not None or value.name == name):
                self.names[value] = name
            elif self.names.get(value) != name:
                self._copies.append((name, value))
        for value in self.graph.values.values():
            if value not in self.names:
                clash = value.name in public or value.name in inner
                self.names[value] = self.fresh(value.name) if clash else value.name

    def _public_outputs(self) -> None:
        for name, value in self._copies:
            self.add("Identity", [self.names[value]], name)

    def _drop_unread(self) -> None:
        """Drop the constants whose readers were written with another form of them (transposed, an attribute).

        What nobody read in the graph either stays: the model came with it.
        """
        read = {name for name, _ in self.graph.outputs}
        for proto in self.nodes:
            read.update(proto.input)
            read.update(captured_names(proto))
        for value in self.graph.constants:
            name = self.names[value]
            if value.users and name not in read:
                self.weights.pop(name, None)

    def _widen(self) -> None:
        """Write codes that other ops than those of quantisation read (a table, for example) as these compute them."""
        from planish.codegen.onnx_codes import widened

        public = set(self.graph.output_values())
        for value in self.graph.constants:
            name, users = self.names[value], value.users
            if name in self.weights and value not in public and not any(u.op.opaque for u in users):
                if any("quantize" not in u.op.name for u in users):
                    self.weights[name] = widened(self, self.weights[name])

    def _opaque(self, node: Node) -> None:
        dialect_name, _, op_type = node.op.name.rpartition("::")
        if node.op.name in _emitters:  # of torch
            _emitters[node.op.name](node, self)
            return
        if dialect_name == "torch":
            raise PlanishError(f"op '{node.op.name}': has no ONNX form", where=str(node), hint=TORCH_CAN)
        domain = domain_of(dialect_name)
        if self.target == "onnx" and domain == CONTRIB and domain not in self.imported:
            raise PlanishError(
                f"op '{node.op.name}': is not in target onnx", where=str(node), hint="write for --target ort"
            )
        overload = node.attributes.get("onnx_overload")
        self._check_version(node, op_type, domain)
        captures = node.attributes.get("captures")
        inner = captures if isinstance(captures, tuple) else ()
        operands = [self.name(v) for v in node.operands]
        explicit = operands[: len(operands) - len(inner)]
        renamed = {str(old): new for old, new in zip(inner, operands[len(explicit) :], strict=True) if old != new}
        schema = _schema(op_type, domain, self.imports.get(domain, 1))
        if schema is not None and schema.min_input < 1000:
            explicit += [""] * (schema.min_input - len(explicit))
        proto = NodeProto(op_type=op_type, input=explicit, output=self.outputs(node))
        if domain:
            proto.domain = domain
        if node.source:
            proto.name = node.source
        if isinstance(overload, str):
            proto.overload = overload
        for key, value in node.attributes.items():
            if key in _renamed_attributes:
                continue
            attribute = attribute_proto(key, value)
            if renamed:
                for graph in _attribute_graphs(attribute):
                    rename_free(graph, renamed)
            proto.attribute.append(attribute)
        self.nodes.append(proto)

    def _check_version(self, node: Node, op_type: str, domain: str) -> None:
        """An opaque node may move to another opset only if its operator is the same there."""
        came_from = node.attributes.get("onnx_opset")
        goes_to = self.imports.setdefault(domain, came_from if isinstance(came_from, int) else 1)
        if isinstance(came_from, int) and came_from != goes_to:
            self._same_operator(node, op_type, domain, came_from)
        captured = opsets_of(self.graph).get("", self.opset)
        if captured != self.opset:
            for attribute in node.attributes.values():
                for graph in _graphs(attribute):
                    for inner in _all_nodes(graph):
                        if inner.domain in ("", "ai.onnx"):
                            self._same_operator(node, inner.op_type, "", captured)

    def _same_operator(self, node: Node, op_type: str, domain: str, came_from: int) -> None:
        goes_to = self.imports[domain]
        before, after = _schema(op_type, domain, came_from), _schema(op_type, domain, goes_to)
        if before is None or after is None or before.since_version != after.since_version:
            name = domain or DEFAULT_DOMAIN
            raise PlanishError(
                f"op '{name}::{op_type}': differs between opset {came_from} and {goes_to} of {name}",
                where=str(node),
                hint=f"write at opset {came_from}",
            )

    def documented(self, tensor: TensorProto) -> TensorProto:
        """Give a tensor the documentation that it came with."""
        stub = self._documents.get(tensor.name)
        if stub is not None:
            tensor.doc_string = stub.doc_string
            tensor.metadata_props.extend(stub.metadata_props)
        return tensor

    def _document(self, made: list[NodeProto]) -> None:
        """Give the nodes that make captured results the documentation that these came with."""
        for proto in made:
            for name in proto.output:
                stub = self._stubs.get(name)
                if stub is not None:
                    if stub.doc_string:
                        proto.doc_string = stub.doc_string
                    proto.metadata_props.extend(stub.metadata_props)
                    proto.device_configurations.extend(stub.device_configurations)

    def _value_infos(self, graph: GraphProto) -> None:
        rest = self.rest.graph
        inputs = {v.name: v for v in self.graph.inputs}
        known = {v.name: v for v in rest.input}
        listed = set(self.weights) & set(known) if self.ir_version < 4 else set()
        order = [n for n in known if n in inputs or n in listed]
        order += [n for n in inputs if n not in known]
        if [n for n in order if n in inputs] != list(inputs):
            order = [*inputs, *(n for n in order if n not in inputs)]
        for name in order:
            if name in inputs:
                graph.input.append(_value_info(name, inputs[name], known.get(name)))
                default = inputs[name].constant
                if default is not None:
                    self.weights[name] = default
            else:
                graph.input.append(known[name])
        known = {v.name: v for v in rest.output}
        for name, value in self.graph.outputs:
            graph.output.append(_value_info(name, value, known.get(name)))
        by_name = {emitted: value for value, emitted in self.names.items()}
        declared = set()
        for info in rest.value_info:
            value_ = by_name.get(info.name)
            if value_ is not None and value_.producer is not None:
                graph.value_info.append(_value_info(info.name, value_, info))
                declared.add(value_)
        for node in self.graph.nodes:
            # the shape inference of Attention takes 0 for the size of the values' heads where it knows no better
            read = node.operand(2) if node.op.name == "onnx::Attention" else None
            if read is not None and read.producer is not None and read.rank == 3 and read not in declared:
                graph.value_info.append(_value_info(self.names[read], read, None))
                declared.add(read)


# the opsets from which on codes have a dtype of their own; those of fewer bits are looked up where it is missing
_CODE_OPSETS = dict.fromkeys(("u3", "i3", "u4", "i4", "u16", "i16"), 21)
_CODE_OPSETS |= dict.fromkeys(("f6e2m3", "f6e3m2", "f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz"), 19)


def least_opset(graph: Graph) -> int:
    """The first opset that can say what the quantised nodes of a graph do; 1 if there are none."""
    least = 1
    for node in graph.nodes:
        if node.op.name in ("quantize", "dequantize", "dequantize_split"):
            least = max(least, 10 if node.attributes.get("axis") is None else AXIS_OPSET)
        elif node.op.name == "dynamic_quantize":
            least = max(least, 11)
        elif node.op.name != "cast":
            continue
        if node.attributes.get("block") is not None:
            least = max(least, 21)
        for value in (*node.operands, *node.results):
            least = max(least, _CODE_OPSETS.get((value.dtype if value is not None else None) or "", 1))
    return least


def _value_info(name: str, value: Value, original: ValueInfoProto | None) -> ValueInfoProto:
    """The declaration of a value: the one it came with, if that is still true, else made from its type."""
    info = ValueInfoProto(name=name)
    if original is not None:
        info.CopyFrom(original)
        was, now = type_of(original.type), value.type
        if not isinstance(now, TensorType) or _holds(was, now):
            return info
    made = type_proto(value.type)
    if made is not None:
        info.type.CopyFrom(made)
    return info


def _holds(declared: object, actual: TensorType) -> bool:
    """True if a declared type does not contradict the actual one."""
    if not isinstance(declared, TensorType) or declared.dtype != actual.dtype:
        return False
    if declared.shape is None or actual.shape is None:
        return True
    if len(declared.shape) != len(actual.shape):
        return False
    pairs = zip(declared.shape, actual.shape, strict=True)
    return all(not isinstance(a, int) or not isinstance(b, int) or a == b for a, b in pairs)


def _graphs(attribute: Attribute) -> Iterable[GraphProto]:
    """The subgraphs in an IR attribute."""
    if isinstance(attribute, Blob):
        if attribute.kind == "onnx.GraphProto":
            yield GraphProto.FromString(attribute.data)
        elif attribute.kind == "onnx.AttributeProto":
            yield from _attribute_graphs(AttributeProto.FromString(attribute.data))
    elif isinstance(attribute, tuple):
        for item in attribute:
            yield from _graphs(item)


def _all_nodes(graph: GraphProto) -> Iterable[NodeProto]:
    """The nodes of a subgraph and of the subgraphs in it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _attribute_graphs(attribute: AttributeProto) -> Iterable[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


@cache
def _least_ir_version(opset: int) -> int:
    """The first IR version that came with an opset."""
    table = onnx.helper.VERSION_TABLE
    return min((row[1] for row in table if row[2] == opset), default=DEFAULT_IR_VERSION)
