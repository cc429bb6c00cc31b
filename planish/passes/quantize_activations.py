"""What stands between an activation and the linears that read it: quantise, dequantise.

    static    x ~ (c - z) d          d, z from calibration, one pair for the tensor
    dynamic   the same from x        of the tensor, of each row (token), or of each N consecutive channels

int8 codes of a row or a tensor are uint8 with zero point 128: the pairing that runtimes multiply fastest; rows that
hardly fall below zero, as statistics say, use all codes for the positive side. An activation that cannot be negative,
whatever the input, has unsigned codes in formats of less than 8 bits. NVFP4's scale of the tensor is calibrated if the
format is static, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from planish.ir.constant import Constant
from planish.ir.evaluator import evaluate_nodes
from planish.ir.formats import Format
from planish.ir.graph import Attribute, Node, Value
from planish.ir.ops.base import Wide
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import Stats
from planish.ir.types import numpy_dtype
from planish.passes.base import PassReport
from planish.passes.bounds import lower_bound
from planish.passes.sites import row_floor
from planish.passes.solvers import StaticRange, choose_static_range, sqnr, static_grid


def unsigned(x: Value, form: Format) -> Format:
    """The format for an activation: its unsigned relative if x cannot be negative and the format has under 8 bits."""
    if form.is_float or not form.symmetric or form.element_bits >= 8:
        return form
    bound = lower_bound(x)
    return replace(form, element=f"u{form.element_bits}", rule="max") if bound is not None and bound >= 0 else form


def is_rounded(x: Value) -> bool:
    """True if a value is made of codes that are computed from an activation."""
    codes = x.producer.operands[0] if x.producer is not None and x.producer.op.name == "dequantize" else None
    return codes is not None and codes.producer is not None and "quantize" in codes.producer.op.name


@dataclass
class Activations:
    """Quantises the activations of one graph, each once however many nodes read it.

    Attributes:
        form: the format.
        rule, percentile: of calibrated ranges.
        made: what stands for each activation.
    """

    form: Format
    rule: StaticRange
    percentile: float
    rewriter: Rewriter
    stats: Stats | None
    report: PassReport
    made: dict[Value, Value] = field(default_factory=dict)

    def of(self, x: Value, node: Node) -> Value:
        """What the readers of x read instead.

        Raises:
            Declined: there are no statistics of it, and the format asks for some.
        """
        if x not in self.made:
            if self.form.static and (self.stats is None or x.name not in self.stats):
                raise Declined("no statistics of what it reads", node)
            form = unsigned(x, self.form)
            # behind the producer: every reader comes later
            before = x.producer._next if x.producer is not None else self.rewriter.graph._first
            assert before is not None  # the node that reads it
            static = form.static and form.granularity == "tensor"
            made = self._static(x, form, before, node) if static else self._dynamic(x, form, before, node)
            self.made[x] = made
            self._judge(x, made, form)
        return self.made[x]

    def _static(self, x: Value, form: Format, before: Node, node: Node) -> Value:
        assert self.stats is not None
        low, high = choose_static_range(self.stats.of(x.name), form, self.rule, self.percentile)
        grid = static_grid(low, high, form)
        constants = [self._constant(np.array(float(grid.scale)), form.scale, f"{x.name}.scale")]
        if grid.zero is not None:
            zero = np.array(float(grid.zero)).astype(numpy_dtype(form.element))
            constants.append(self._constant(zero, form.element, f"{x.name}.zero"))
        codes = self.rewriter.insert(
            "quantize", [x, *constants], {"dtype": form.element}, before=before, names=[f"{x.name}.codes"],
            source=node.source,
        )  # fmt: skip
        return self._dequantized(x, [codes.result, *constants], {}, form, before, node)

    def _dynamic(self, x: Value, form: Format, before: Node, node: Node) -> Value:
        own: dict[str, Attribute] = {} if form.granularity == "tensor" else {"granularity": form.granularity}
        if form.element == "i8" and form.granularity != "group" and form.rule == "max" and form.scale == "f32":
            floor = self._floor(x) if form.granularity == "token" else None
            own |= {"symmetric": True} if floor is None else {"floor": floor}
            with_zero = True
        else:
            own |= {} if form.element == "u8" else {"dtype": form.element}
            own |= {} if form.block is None else {"block": form.block}
            own |= {} if form.scale == "f32" else {"scale": form.scale}
            own |= {} if form.rule == ("floor" if form.scale == "f8e8m0" else "max") else {"rule": form.rule}
            own |= {"symmetric": True} if form.symmetric and not form.is_float else {}
            with_zero = not form.symmetric
        operands: list[Value | None] = [x]
        outer: Value | None = None
        if form.static and self.stats is not None:  # the scale of the tensor beside those of its blocks
            largest = float(self.stats.of(x.name).largest.max())
            outer = self._constant(np.array(largest / (448.0 * form.range[1]) or 1.0), "f32", f"{x.name}.global_scale")
            operands.append(outer)
        codes = self.rewriter.insert(
            "dynamic_quantize", operands, own, before=before,
            names=[f"{x.name}.codes", f"{x.name}.scale", f"{x.name}.zero"], source=node.source,
        )  # fmt: skip
        scale = codes.results[1]
        if outer is not None:
            scale = self.rewriter.insert(
                "dequantize", [scale, outer], before=before, names=[f"{x.name}.block_scale"], source=node.source
            ).result
        held = [codes.results[0], scale, *codes.results[2 if with_zero else 3 :]]
        attributes: dict[str, Attribute] = {}
        if form.granularity == "group":
            assert x.rank is not None
            attributes = {"axis": x.rank - 1, "block": form.block}
        return self._dequantized(x, held, attributes, form, before, node)

    def _dequantized(
        self,
        x: Value,
        operands: list[Value],
        attributes: dict[str, Attribute],
        form: Format,
        before: Node,
        node: Node,
    ) -> Value:
        scale = operands[1]
        if scale.dtype != "f32":
            attributes = {**attributes, "dtype": "f32"}
        names = [f"{x.name}.dequantized"]
        return self.rewriter.insert(
            "dequantize", operands, attributes, before=before, names=names, source=node.source
        ).result

    def _constant(self, data: np.ndarray, dtype: str, name: str) -> Value:
        return self.rewriter.constant(Constant(data, dtype, data.shape), name)

    def _floor(self, x: Value) -> float | None:
        """The bound below zero of an activation that hardly falls below it; None: unknown, or it does."""
        if self.stats is None or x.name not in self.stats:
            return None
        record = self.stats.of(x.name)
        floor = row_floor(float(record.minimum.min()), float(record.maximum.max()))
        return None if floor is None else float(np.float32(floor))

    def _judge(self, x: Value, made: Value, form: Format) -> None:
        if self.stats is None or x.name not in self.stats:
            return
        samples = self.stats.of(x.name).samples.astype(np.float64)
        figure: dict[str, object] = {"sqnr_db": sqnr(samples, as_read(samples, x, made))}
        if form.element != self.form.element:
            figure["format"] = str(form)
        self.report.figures.setdefault("activations", {})[x.name] = figure


def as_read(samples: np.ndarray, x: Value, dequantised: Value) -> np.ndarray:
    """Rows [N, C] of an activation as the readers of `dequantised` see them, by the rows of the nodes between."""
    nodes: list[Node] = []
    waiting = [dequantised.producer]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.append(node)
            waiting += [v.producer for v in node.operands if v is not None and v is not x]

    def seen(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = evaluate_nodes(nodes[::-1], {x: rows}, [dequantised], Wide(torch.float64))[dequantised]
        return found

    rows = torch.from_numpy(samples)
    if x.rank == 1:  # a row is all of it
        result: np.ndarray = torch.stack([seen(row) for row in rows]).numpy()
        return result
    rank = x.rank if x.rank is not None else 2
    return seen(rows.reshape((1,) * (rank - 2) + samples.shape)).numpy().reshape(samples.shape)
