"""The text form of a graph: deterministic, ASCII, diffable. `parse(print_graph(g)) == g`.

    graph @main(%ids: i64[batch, seq]) {
      meta onnx.opset = 20
      %w = constant : f32[384, 384] @"w"
      %eps = constant : f32[] = 1e-05
      %h: f32[batch, seq, 384] = embedding(%w, %ids) from "/embeddings/Gather"
      return %h as "last_hidden_state"
    }

Constants of up to 16 elements and blobs of up to 1 KB are printed in place, bit for bit; the data of the
others goes by a key: `constants_of(graph)` gives them, and `parse(text, constants)` takes them back.
`wide` after a type marks a constant whose data is held in float64.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Mapping

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Blob, Graph, Node, Value
from planish.ir.literals import encode_elements, encode_float, quote
from planish.ir.parser import parse
from planish.ir.types import TensorType, Type

__all__ = ["constants_of", "difference", "node_text", "parse", "print_graph", "quote", "render"]

INLINE_ELEMENTS = 16  # a constant with more elements is printed by key
INLINE_BYTES = 1024  # a blob with more bytes is printed by key
_WIDTH = 110
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*\Z", re.ASCII)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*(?:::[A-Za-z0-9_.]+)?\Z", re.ASCII)
_RESERVED = frozenset({"constant", "meta", "return"})


def print_graph(graph: Graph) -> str:
    """The text of a graph; ends with a newline."""
    return render(graph)[0]


def constants_of(graph: Graph) -> dict[str, Constant]:
    """The constants that the text names by key: what `parse` needs beside the text."""
    return render(graph)[1]


def node_text(node: Node) -> str:
    """The line of a node; constants and blobs that are large are named by key."""
    return _Printer(set()).node(node)


def render(graph: Graph) -> tuple[str, dict[str, Constant]]:
    """The text of a graph, and the constants that it names by key."""
    printer = _Printer({value.name for value in graph.values.values() if value.constant is not None})
    inputs = [printer.input(value) for value in graph.inputs]
    name = graph.name if _NAME.match(graph.name) else quote(graph.name)
    head = f"graph @{name}({', '.join(inputs)}) {{"
    if len(head) > _WIDTH:
        head = f"graph @{name}(\n    " + ",\n    ".join(inputs) + "\n) {"
    lines = [head]
    for key, attribute in graph.meta.items():
        lines.append(f"  meta {_word(key)} = {printer.attribute(attribute, f'meta/{key}')}")
    for value in graph.values.values():
        if value.is_constant and value.constant is not None:
            lines.append(f"  {_reference(value)} = {printer.constant(value.constant, value.name, own=True)}")
    for node in graph.nodes:
        lines.append("  " + printer.node(node))
    outputs = [f"{_reference(value)} as {quote(name)}" for name, value in graph.outputs]
    tail = f"  return {', '.join(outputs)}"
    if len(tail) > _WIDTH:
        tail = "  return\n    " + ",\n    ".join(outputs)
    lines += [tail.rstrip(), "}", ""]
    return "\n".join(lines), printer.constants


def _reference(value: Value | None) -> str:
    if value is None:
        return "_"
    return f"%{value.name}" if _NAME.match(value.name) else "%" + quote(value.name)


def _word(text: str) -> str:
    return text if _WORD.match(text) and text not in _RESERVED else quote(text)


class _Printer:
    """Prints the parts of one graph; collects the constants that go by key.

    A key is the name of the value, or `result/attribute` inside a node. One that a constant of the graph
    has as its own name (`taken`) is never given to another.
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.constants: dict[str, Constant] = {}
        self.keys: dict[int, str] = {}  # by the identity of the constant: tied data has one key
        self.types: dict[Type, str] = {}

    def type(self, type_: Type) -> str:
        text = self.types.get(type_)
        if text is None:
            text = self.types[type_] = str(type_)
        return text

    def input(self, value: Value) -> str:
        text = f"{_reference(value)}: {self.type(value.type)}"
        if value.constant is not None:
            text += f" = {self.constant(value.constant, value.name, own=True)}"
        return text

    def node(self, node: Node) -> str:
        left = ", ".join([f"{_reference(v)}: {self.type(v.type)}" for v in node.results])
        operands = ", ".join([_reference(v) for v in node.operands])
        text = f"{_word(node.op.name)}({operands})"
        if left:
            text = f"{left} = {text}"
        if node.attributes:
            place = node.results[0].name if node.results else "node"
            entries = [f"{_word(k)} = {self.attribute(a, f'{place}/{k}')}" for k, a in node.attributes.items()]
            text += " {" + ", ".join(entries) + "}"
        return f"{text} from {quote(node.source)}" if node.source else text

    def constant(self, constant: Constant, key: str, own: bool = False) -> str:
        wide = " wide" if constant.is_wide else ""
        head = f"constant : {self.type(constant.type)}{wide}"
        if constant.size > INLINE_ELEMENTS:
            return f"{head} @{quote(self.key(constant, key, own))}"
        words = encode_elements(constant._raw(), constant.dtype)
        return f"{head} = {words[0] if constant.shape == () else '[' + ', '.join(words) + ']'}"

    def key(self, constant: Constant, key: str, own: bool) -> str:
        known = self.keys.get(id(constant))
        if known is None:
            while key in self.constants or (not own and key in self.taken):
                key += "'"
            known = self.keys[id(constant)] = key
            self.constants[key] = constant
        return known

    def data(self, data: bytes, key: str) -> str:
        if len(data) <= INLINE_BYTES:
            return "base64 " + quote(base64.b64encode(data).decode("ascii"))
        import numpy as np

        return "@" + quote(self.key(Constant(np.frombuffer(data, np.uint8), "u8", (len(data),)), key, False))

    def attribute(self, attribute: Attribute, key: str) -> str:
        kind = type(attribute)
        if kind is int:
            return str(attribute)
        if isinstance(attribute, str):
            return quote(attribute)
        if isinstance(attribute, tuple):
            return "[" + ", ".join([self.attribute(a, f"{key}/{i}") for i, a in enumerate(attribute)]) + "]"
        if kind is float:
            return encode_float(attribute)  # type: ignore[arg-type]
        if attribute is None:
            return "none"
        if kind is bool:
            return "true" if attribute else "false"
        if isinstance(attribute, Constant):
            return self.constant(attribute, key)
        if isinstance(attribute, TensorType):
            return self.type(attribute)
        if isinstance(attribute, bytes):
            if len(attribute) <= 64:
                return "b" + quote(attribute.decode("latin-1"))
            return f"bytes({self.data(attribute, key)})"
        if isinstance(attribute, Blob):
            return f"blob({quote(attribute.kind)}, {self.data(attribute.data, key)})"
        raise TypeError(f"attribute '{key}': a {kind.__name__} is no attribute; see planish.ir.graph.Attribute")


def same_attribute(a: Attribute, b: Attribute) -> bool:
    """Equality that tells 1 from 1.0 from True, 0.0 from -0.0, and takes a NaN as equal to itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_attribute, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return encode_float(a) == encode_float(b)
    return a == b


def _mapping_difference(a: Mapping[str, Attribute], b: Mapping[str, Attribute], of: str) -> str | None:
    for name in [*a, *b]:
        if name not in a or name not in b:
            return f"{of}: only the {'first' if name in a else 'second'} has '{name}'"
        if not same_attribute(a[name], b[name]):
            texts = [_Printer(set()).attribute(m[name], name) for m in (a, b)]
            return f"{of}: '{name}' is {texts[0]}, not {texts[1]}"
    return None


def _node_difference(a: Node, b: Node) -> str | None:
    of = f"node {_reference(a.results[0])}" if a.results else f"node '{a.op.name}'"
    names = [v.name for v in a.results], [v.name for v in b.results]
    if names[0] != names[1]:
        return f"{of}: results are named {', '.join(names[0])}, not {', '.join(names[1])}"
    if a.op.name != b.op.name:
        return f"{of}: op is {a.op.name}, not {b.op.name}"
    reads = (
        [None if v is None else v.name for v in a.operands],
        [None if v is None else v.name for v in b.operands],
    )
    if reads[0] != reads[1]:
        texts = [", ".join(map(_reference, node.operands)) for node in (a, b)]
        return f"{of}: operands are ({texts[0]}), not ({texts[1]})"
    for mine, theirs in zip(a.results, b.results, strict=True):
        if mine.type != theirs.type:
            return f"{of}: type of {_reference(mine)} is {mine.type}, not {theirs.type}"
    if a.source != b.source:
        return f"{of}: source is {quote(a.source)}, not {quote(b.source)}"
    return _mapping_difference(a.attributes, b.attributes, of) if a.attributes or b.attributes else None


def _value_difference(a: Value, b: Value, of: str) -> str | None:
    if a.name != b.name:
        return f"{of} is named {quote(a.name)}, not {quote(b.name)}"
    if a.type != b.type:
        return f"{of} {_reference(a)}: type is {a.type}, not {b.type}"
    if (a.constant is None) != (b.constant is None):
        return f"{of} {_reference(a)}: only the {'first' if b.constant is None else 'second'} has a default"
    if a.constant != b.constant:
        return f"{of} {_reference(a)}: the data differ"
    return None


def difference(a: Graph, b: Graph) -> str | None:
    """The first structural difference as a sentence, None if the graphs are equal.

    Equal are names, types, nodes, attributes (whatever their order), sources, and constants bit for bit.
    """
    if a.name != b.name:
        return f"graph is named {quote(a.name)}, not {quote(b.name)}"
    found = _mapping_difference(a.meta, b.meta, "meta")
    if found:
        return found
    for what, mine, theirs in (("input", a.inputs, b.inputs), ("constant", a.constants, b.constants)):
        for i, (value, other) in enumerate(zip(mine, theirs, strict=False)):
            found = _value_difference(value, other, what if value.name == other.name else f"{what} {i}")
            if found:
                return found
        if len(mine) != len(theirs):
            return f"number of {what}s is {len(mine)}, not {len(theirs)}"
    for node, other_node in zip(a.nodes, b.nodes, strict=False):
        found = _node_difference(node, other_node)
        if found:
            return found
    if len(a) != len(b):
        counts = [Counter(node.op.name for node in graph.nodes) for graph in (a, b)]
        excess = (counts[0] - counts[1]) or (counts[1] - counts[0])
        return f"number of nodes is {len(a)}, not {len(b)} (excess: {', '.join(sorted(excess))})"
    outputs = [[(name, value.name) for name, value in graph.outputs] for graph in (a, b)]
    if outputs[0] != outputs[1]:
        texts = [", ".join(f"%{value} as {quote(name)}" for name, value in pairs) for pairs in outputs]
        return f"outputs are {texts[0]}, not {texts[1]}"
    return None
