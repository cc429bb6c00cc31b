"""Reads the text form (`planish.ir.text`): hand-written, without backtracking, in linear time.

    graph      = "graph" "@" name "(" [input {"," input}] ")" "{" {meta | constant | node} return "}"
    input      = value ":" type ["=" data]
    meta       = "meta" word "=" attribute
    constant   = value "=" data
    data       = "constant" ":" type ["wide"] ("@" string | "=" element | "=" "[" [element {"," element}] "]")
    node       = [value ":" type {"," value ":" type} "="] word "(" [operand {"," operand}] ")"
                 ["{" word "=" attribute {"," word "=" attribute} "}"] ["from" string]
    return     = "return" [value "as" string {"," value "as" string}]
    value      = "%" name          operand = value | "_"          name, word = identifier | string

White space and comments (`#` to the end of the line) may stand between any two words.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Attribute, Blob, Graph, Value
from planish.ir.literals import decode_elements, decode_float, unquote
from planish.ir.ops.base import OpDef
from planish.ir.types import DTYPES, UNKNOWN, Dim, OtherType, TensorType, Type

_SPACE = r"(?:[ \t\r\n]+|#[^\n]*)*"
_QUOTED = r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
_DEPTH = 64  # of nested attribute lists


def _token(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{_SPACE}({pattern})", re.ASCII)


_BLANK = re.compile(_SPACE)
_STRING = _token(_QUOTED)
_WORD = _token(r"[A-Za-z_][A-Za-z0-9_.]*(?:::[A-Za-z0-9_.]+)?")
_NAME = _token(rf"[A-Za-z0-9_][A-Za-z0-9_.]*|{_QUOTED}")
_VALUE = _token(rf"%(?:[A-Za-z0-9_][A-Za-z0-9_.]*|{_QUOTED})")
_OPERANDS = _token(r"\((?:(?:%[A-Za-z0-9_.]+|_)(?:, (?:%[A-Za-z0-9_.]+|_))*)?\)")  # as they mostly are printed
_TYPE = _token(r'[a-z][a-z0-9]*\[[^\]"#]*\]|unknown\b')
_NUMBER = _token(r"-?(?:inf|nan(?::0x[0-9a-f]{16})?|[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)(?![A-Za-z0-9_.])")
_LIST = _token(r'\[[^\]"#()]*\]')
_ELEMENT = _token(rf"b?{_QUOTED}|\([^()]*\)|[-+A-Za-z0-9_.]+")
_BYTES = _token(rf"b{_QUOTED}")
_PUNCTUATION = {text: _token(re.escape(text)) for text in "(){}[],:=@"}
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)


def parse(text: str, constants: Mapping[str, Constant] | None = None) -> Graph:
    """The graph that a text describes.

    Args:
        text: the text form.
        constants: the data that the text names by key.

    Raises:
        PlanishError: with line, column and a caret.
    """
    return _Parser(text, constants or {}).graph()


def parse_type(text: str) -> Type:
    """A type alone."""
    parser = _Parser(text, {})
    type_ = parser.type()
    parser.finish()
    return type_


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, Constant]) -> None:
        self.text = text
        self.at = 0
        self.constants = constants
        self.types: dict[str, Type] = {}
        self.rows: dict[str, OpDef] = {}
        self.result = Graph()

    # -- words -----------------------------------------------------------------------------------

    def next(self) -> int:
        """The position of the next word."""
        blank = _BLANK.match(self.text, self.at)
        return blank.end() if blank else self.at

    def error(self, what: str, at: int | None = None, hint: str | None = None) -> PlanishError:
        at = self.next() if at is None else at
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        line, column = self.text.count("\n", 0, at) + 1, at - start + 1
        left = max(start, at - 60)
        shown = self.text[left : min(len(self.text) if end < 0 else end, left + 100)].replace("\t", " ")
        where = f"line {line}, column {column}\n    {shown}\n    {' ' * (at - left)}^"
        return PlanishError(f"text: {what}", where=where, hint=hint)

    def wrong(self, expected: str) -> PlanishError:
        at = self.next()
        peek = _ELEMENT.match(self.text, at)
        got = peek[1] if peek and len(peek[1]) <= 40 else self.text[at : at + 1]
        return self.error(f"wrong word; expected {expected}, got {repr(got) if got else 'the end'}", at)

    def take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[1]

    def accept(self, punctuation: str) -> bool:
        return self.take(_PUNCTUATION[punctuation]) is not None

    def expect(self, punctuation: str) -> None:
        if self.take(_PUNCTUATION[punctuation]) is None:
            raise self.wrong(f"'{punctuation}'")

    def keyword(self, word: str) -> bool:
        match = _WORD.match(self.text, self.at)
        if match is None or match[1] != word:
            return False
        self.at = match.end()
        return True

    def unquoted(self, word: str) -> str:
        """What a word means that may be quoted and was just read."""
        if not word.startswith('"'):
            return word
        try:
            return unquote(word[1:-1])
        except (ValueError, OverflowError) as error:
            raise self.error(f"bad string: {error}", self.at - len(word)) from None

    def string(self) -> str:
        word = self.take(_STRING)
        if word is None:
            raise self.wrong("a string")
        return self.unquoted(word)

    def word(self, what: str) -> str:
        word = self.take(_WORD) or self.take(_STRING)
        if word is None:
            raise self.wrong(what)
        return self.unquoted(word)

    def finish(self) -> None:
        if self.next() < len(self.text):
            raise self.wrong("the end")

    # -- the graph -------------------------------------------------------------------------------

    def graph(self) -> Graph:
        if not self.keyword("graph"):
            raise self.wrong("'graph'")
        self.expect("@")
        name = self.take(_NAME)
        if name is None:
            raise self.wrong("the name of the graph")
        self.result.name = self.unquoted(name)
        self.expect("(")
        while not self.accept(")"):
            if self.result.inputs:
                self.expect(",")
            self.input()
        self.expect("{")
        while not self.keyword("return"):
            if self.keyword("meta"):
                key = self.word("a name")
                self.expect("=")
                self.result.meta[key] = self.attribute()
            else:
                self.statement()
        while not self.accept("}"):
            if self.result.outputs:
                self.expect(",")
            value = self.known(self.value())
            if not self.keyword("as"):
                raise self.wrong("'as'")
            self.result.add_output(self.string(), value)
        self.finish()
        return self.result

    def input(self) -> None:
        name = self.defined(self.value())
        self.expect(":")
        type_ = self.type()
        default = None
        if self.accept("="):
            if not self.keyword("constant"):
                raise self.wrong("'constant'")
            default = self.constant()
        self.result.add_input(name, type_, default)

    def statement(self) -> None:
        """A constant or a node."""
        names: list[str] = []
        types: list[Type] = []
        start = self.next()
        if self.text.startswith("%", start):
            while True:
                names.append(self.defined(self.value()))
                if len(names) == 1 and self.accept("="):
                    if not self.keyword("constant"):
                        raise self.wrong("'constant'; a result of a node needs a type")
                    self.result.add_constant(names[0], self.constant())
                    return
                self.expect(":")
                types.append(self.type())
                if not self.accept(","):
                    break
            self.expect("=")
            if len(set(names)) < len(names):
                raise self.error("two results have one name", start)
        row = self.row()
        operands = self.operands()
        attributes: dict[str, Attribute] = {}
        if self.accept("{"):
            while not self.accept("}"):
                if attributes:
                    self.expect(",")
                key = self.word("the name of an attribute")
                if key in attributes:
                    raise self.error(f"attribute '{key}' is given twice")
                self.expect("=")
                attributes[key] = self.attribute()
        source = self.string() if self.keyword("from") else ""
        self.result.append(row, operands, attributes, names=names, types=types, source=source)

    def row(self) -> OpDef:
        at = self.next()
        name = self.word("an op")
        row = self.rows.get(name)
        if row is None:
            try:
                row = self.rows[name] = ops.get(name)
            except PlanishError as error:
                raise self.error(error.what, at, error.hint) from None
        return row

    def operands(self) -> list[Value | None]:
        values = self.result.values
        at = self.at
        simple = self.take(_OPERANDS)
        if simple is not None:
            try:
                words = simple[1:-1].split(", ") if len(simple) > 2 else []
                return [None if word == "_" else values[word[1:]] for word in words]
            except KeyError:
                self.at = at  # again, to say where
        self.expect("(")
        found: list[Value | None] = []
        while not self.accept(")"):
            if found:
                self.expect(",")
            found.append(None if self.keyword("_") else self.known(self.value()))
        return found

    def value(self) -> str:
        word = self.take(_VALUE)
        if word is None:
            raise self.wrong("a value")
        return self.unquoted(word[1:])

    def known(self, name: str) -> Value:
        value = self.result.values.get(name)
        if value is None:
            recent = list(self.result.values)[-10_000:]
            raise self.error(f"%{name}: not defined here", self.behind(), nearest(name, recent))
        return value

    def defined(self, name: str) -> str:
        if name in self.result.values:
            raise self.error(f"%{name}: defined twice", self.behind())
        if not name:
            raise self.error("a value needs a name", self.behind())
        return name

    def behind(self) -> int:
        """Where the value stands that was just read."""
        return self.text.rfind("%", 0, self.at)

    # -- types -----------------------------------------------------------------------------------

    def type(self) -> Type:
        at = self.next()
        simple = self.take(_TYPE)
        if simple is not None:
            type_ = self.types.get(simple)
            if type_ is not None:
                return type_
            self.at = at
        type_ = self.fresh_type(at)
        self.types[self.text[at : self.at]] = type_
        return type_

    def fresh_type(self, at: int) -> Type:
        word = self.take(_WORD)
        if word == "unknown":
            return UNKNOWN
        if word == "other":
            self.expect("(")
            text = self.string()
            self.expect(")")
            return OtherType(text)
        if word is None:
            raise self.wrong("a type")
        if word not in DTYPES:
            raise self.error(f"dtype '{word}': unknown", at, nearest(word, DTYPES))
        self.expect("[")
        if self.text.startswith("*", self.next()):
            self.at = self.next() + 1
            self.expect("]")
            return TensorType(word)
        dims: list[Dim] = []
        while not self.accept("]"):
            if dims:
                self.expect(",")
            dims.append(self.dim())
        return TensorType(word, tuple(dims))

    def dim(self) -> Dim:
        at = self.next()
        if self.text.startswith("?", at):
            self.at = at + 1
            return None
        word = self.take(_NAME)
        if word is None:
            raise self.wrong("a dim")
        if word.startswith('"') or _SYMBOL.match(word):
            return self.unquoted(word)
        if not word.isdigit() or len(word) > 19:
            raise self.error(f"dim '{word}': neither a number nor a name", at)
        return int(word)

    # -- attributes and data ---------------------------------------------------------------------

    def attribute(self, depth: int = 0) -> Attribute:
        at = self.next()
        first = self.text[at : at + 1]
        if first == '"':
            return self.string()
        if first == "[":
            if depth > _DEPTH:
                raise self.error("lists are nested too deeply", at)
            self.at = at + 1
            items: list[Attribute] = []
            while not self.accept("]"):
                if items:
                    self.expect(",")
                items.append(self.attribute(depth + 1))
            return tuple(items)
        number = self.take(_NUMBER)
        if number is not None:
            try:
                return decode_float(number) if re.search("[.en]", number) else int(number)
            except ValueError as error:
                raise self.error(f"bad number: {error}", at) from None
        raw = self.take(_BYTES)
        if raw is not None:
            return self.latin(raw[1:], at)
        if self.keyword("none"):
            return None
        if self.keyword("true"):
            return True
        if self.keyword("false"):
            return False
        if self.keyword("constant"):
            return self.constant()
        if self.keyword("bytes"):
            self.expect("(")
            data = self.data()
            self.expect(")")
            return data
        if self.keyword("blob"):
            self.expect("(")
            kind = self.string()
            self.expect(",")
            blob = Blob(kind, self.data())
            self.expect(")")
            return blob
        type_ = self.type() if _WORD.match(self.text, at) else None
        if not isinstance(type_, TensorType):
            raise self.error("wrong word; expected an attribute", at)
        return type_

    def latin(self, quoted: str, at: int) -> bytes:
        try:
            return self.unquoted(quoted).encode("latin-1")
        except UnicodeEncodeError:
            raise self.error("bytes have only the escapes \\x00 to \\xff", at) from None

    def data(self) -> bytes:
        at = self.next()
        if self.keyword("base64"):
            try:
                return base64.b64decode(self.string(), validate=True)
            except (binascii.Error, ValueError) as error:
                raise self.error(f"bad base64: {error}", at) from None
        constant = self.keyed()
        if constant.dtype != "u8":
            raise self.error(f"data of a blob; expected u8, got {constant.type}", at)
        return constant.array().tobytes()

    def keyed(self) -> Constant:
        self.expect("@")
        at = self.next()
        key = self.string()
        constant = self.constants.get(key)
        if constant is None:
            raise self.error(f"data '{key}': not given", at, nearest(key, list(self.constants)[:10_000]))
        return constant

    def constant(self) -> Constant:
        """What follows the word `constant`."""
        self.expect(":")
        at = self.next()
        type_ = self.type()
        if not isinstance(type_, TensorType) or type_.shape is None:
            raise self.error("a constant needs a static type", at)
        shape = tuple([d for d in type_.shape if isinstance(d, int)])
        if len(shape) < len(type_.shape):
            raise self.error("a constant needs a static type", at)
        wide = self.keyword("wide")
        if self.text.startswith("@", self.next()):
            constant = self.keyed()
            if (constant.type, constant.is_wide) != (type_, wide):
                got = f"{constant.type}{' wide' if constant.is_wide else ''}"
                raise self.error(f"data of another type; expected {type_}{' wide' if wide else ''}, got {got}", at)
            return constant
        self.expect("=")
        at = self.next()
        return self.inline(type_.dtype, shape, wide, at)

    def inline(self, dtype: str, shape: tuple[int, ...], wide: bool, at: int) -> Constant:
        words: list[str] = []
        simple = self.take(_LIST)
        if simple is not None:
            words = [word.strip() for word in simple[1:-1].split(",")] if simple[1:-1].strip() else []
        elif self.accept("["):
            while not self.accept("]"):
                if words:
                    self.expect(",")
                words.append(self.element())
        else:
            words = [self.element()]
        size = math.prod(shape)
        if len(words) != size:
            raise self.error(f"wrong number of elements; expected {size}, got {len(words)}", at)
        if dtype == "str":
            import numpy as np

            strings = np.empty(size, object)
            for i, word in enumerate(words):
                if not word.endswith('"'):
                    raise self.error(f"bad element: '{word}' is no string", at)
                strings[i] = self.latin(word[1:], at) if word.startswith("b") else self.unquoted(word)
            return Constant(strings.reshape(shape), dtype, shape)
        try:
            return Constant(decode_elements(words, dtype, wide).reshape(shape), dtype, shape)
        except ValueError as error:
            raise self.error(f"bad element: {error}", at) from None

    def element(self) -> str:
        word = self.take(_ELEMENT)
        if word is None:
            raise self.wrong("an element")
        return word
