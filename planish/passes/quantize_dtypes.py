"""Linears of other floats than f32, made ready for codes: their arithmetic goes to f32, between casts.

    y = linear(x, W, b)  in f16     ->     y = cast(linear(cast(x), W, b))     W, b the same numbers in f32

Codes and scales are f32 numbers; a product of codes added up in f16 or bf16 would lose what they hold. The rounding to
the model's own dtype stays where it was: on the result. A kernel reads and writes the model's dtype anyway and adds
up in f32, so the casts are free in it. From f64 this rounds, as the codes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.stats import Stats
from planish.ir.types import WIDE_FLOATS, TensorType
from planish.passes.quantize_weights import split_of


@dataclass
class Widening:
    """Moves linears, convolutions and embeddings to f32.

    Attributes:
        wide: an activation or constant of another float -> the same numbers in f32.
    """

    rewriter: Rewriter
    wide: dict[Value, Value] = field(default_factory=dict)

    def node(self, node: Node, operands: Sequence[int]) -> None:
        """Compute a node in f32 and cast its result to what it was.

        Args:
            operands: the floats that it reads; each is of `WIDE_FLOATS`.
        """
        result, kind = node.result, node.result.type
        assert isinstance(kind, TensorType)
        for index in operands:
            value = node.operand(index)
            if value is not None and value.dtype in WIDE_FLOATS and value.dtype != "f32":
                self.rewriter.set_operand(node, index, self._of(value, node))
        if kind.dtype == "f32":
            return
        name = result.name
        self.rewriter.rename(result, self.rewriter.graph.fresh_name(f"{name}.f32"))
        self.rewriter.retype(result, replace(kind, dtype="f32"))
        cast = self.rewriter.insert(
            "cast", [result], {"to": kind.dtype}, before=node._next, names=[name], source=node.source
        )
        self.rewriter.replace(result, cast.result)

    def finish(self) -> None:
        """Drop constants that nobody reads in their own dtype any more; what stands for them takes their names."""
        given = self.rewriter.graph.output_values()
        for old, new in reversed(self.wide.items()):  # what is made of constants before the constants
            if old.users or any(old is v for v in given) or not (old.is_constant or split_of(old) is not None):
                continue
            name = old.name
            if old.producer is not None:
                self.rewriter.erase(old.producer)
            else:
                self.rewriter.rename(old, self.rewriter.graph.fresh_name(f"{name}.{old.dtype}"))
            self.rewriter.rename(new, name)

    def _of(self, value: Value, node: Node) -> Value:
        if value in self.wide:
            return self.wide[value]
        name, split = f"{value.name}.f32", split_of(value)
        if value.constant is not None:
            held = Constant(value.constant.wide(), "f32", value.constant.shape)
            made = self.rewriter.constant(held, name)
        elif split is not None:
            floats = [v if v is None or v.dtype not in WIDE_FLOATS else self._of(v, node) for v in split.operands]
            attributes = {k: v for k, v in split.attributes.items() if k != "dtype"}
            names = [self.rewriter.graph.fresh_name(name)]
            made = self.rewriter.insert(
                split.op.name, floats, attributes, before=split, names=names, source=split.source
            ).result
        else:
            before = value.producer._next if value.producer is not None else self.rewriter.graph._first
            names = [self.rewriter.graph.fresh_name(name)]
            made = self.rewriter.insert(
                "cast", [value], {"to": "f32"}, before=before, names=names, source=node.source
            ).result
        self.wide[value] = made
        return made

    def known(self, stats: Stats | None) -> Stats | None:
        """The statistics, with those of each activation under the name of its f32 too."""
        if stats is None or not self.wide:
            return stats
        found = stats.copy()
        for old, new in self.wide.items():
            if old.name in stats:
                found.channels[new.name] = stats.channels[old.name]
        return found
