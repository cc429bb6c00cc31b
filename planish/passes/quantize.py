"""Quantise linears, convolutions and embedding tables to 8 bits.

    weight      w ~ c * d_o            c int8 in [-127, 127], one scale d_o per output channel
    activation  x ~ (c - z) * d        c uint8; d, z of the tensor or of each row (token)
    table       e ~ c * d_r            c int8, one scale per row

`activations` says where d and z come from: `dynamic` (the range of the tensor at run time), `token`
(the largest magnitude of each row at run time, z = 128), `static` (from calibration, a uint8 range that
contains 0), or `none` (weights only). The graph afterwards holds explicit quantize / dequantize nodes
around the same linears: every target lowers that form. An activation with several readers is
quantised once. Lossy: reports the signal-to-noise ratio of each weight and, where there are
statistics, of each activation.

With statistics, `solver=gptq` picks the weight codes so that the output of the layer is kept
(`planish.passes.solvers`), and `bias_correction` adds to each bias the mean error of its output over
the samples, E[x W^T - Q(x) Q(W)^T] (Nagel et al., arXiv 1906.04721): neither costs anything at run time.

`static_range` picks the calibrated range: `min-max`; `percentile` (of the sampled elements); `mse` (the
clipping of that range with the least squared rounding error on the samples).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.ops.base import Wide
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import Stats
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.options import Range, option
from planish.passes.sites import READERS, reads_by_weight, row_floor, weight_matrix
from planish.passes.solvers import (
    choose_static_range,
    choose_weight_scale,
    gptq,
    hessian,
    round_to_nearest,
    sqnr,
)


@dataclass(frozen=True)
class Quantize(Pass):
    """Put 8-bit numbers on weights, activations and embedding tables."""

    name = "quantize"
    exactness = Exactness.LOSSY
    gives = frozenset({"quantised"})

    activations: Literal["dynamic", "token", "static", "none"] = "dynamic"
    weight_clip: Literal["max", "mse"] = "max"
    solver: Literal["rtn", "gptq"] = "rtn"  # gptq needs statistics
    bias_correction: bool = False  # needs statistics
    static_range: Literal["min-max", "percentile", "mse"] = "min-max"
    percentile: float = option(99.99, Range(above=0, most=100))  # percent of the elements inside the range
    embeddings: bool = True  # quantise embedding tables too
    min_rows: int = option(256, Range(0))  # of an embedding table worth quantising
    skip: tuple[str, ...] = ()  # regular expressions: nodes whose source or result name matches stay float

    @property
    def needs_stats(self) -> bool:
        return self.activations == "static" or self.solver == "gptq" or self.bias_correction

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise PlanishError(
                    f"pass 'quantize': option 'skip': '{pattern}' is no regular expression: {error}"
                ) from error

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.needs_stats and context.stats is None:
            raise PlanishError("pass 'quantize': needs calibration statistics", where=str(self))
        shared: dict[Value, Value] = {}
        weights: dict[Value, Value] = {}
        with Rewriter(graph) as rewriter:
            for node in list(graph.nodes):
                if node.op.name not in READERS and node.op.name != "embedding":
                    continue
                try:
                    if self._skipped(node):
                        raise Declined("skipped by name", node)
                    if node.op.name == "embedding":
                        done = self.embeddings and self._table(node, rewriter, report)
                    else:
                        done = self._reader(node, rewriter, context.stats, report, shared, weights)
                except Declined as refusal:
                    report.decline(str(refusal), node)
                    continue
                if done:
                    report.applied.append(place(node))
        return report

    def _skipped(self, node: Node) -> bool:
        return any(re.search(p, name) for p in self.skip for name in (node.source, node.result.name) if name)

    def _reader(
        self,
        node: Node,
        rewriter: Rewriter,
        stats: Stats | None,
        report: PassReport,
        shared: dict[Value, Value],
        weights: dict[Value, Value],
    ) -> bool:
        x, weight = node.operands[0], node.operand(1)
        if x is None or weight is None or not weight.is_constant:
            return False
        if not reads_by_weight(node, x) and not (node.op.name == "conv" and self.activations in ("static", "none")):
            raise Declined(f"this form of {node.op.name} is not quantised", node)
        if node.op.name == "conv" and self.activations not in ("static", "none"):
            raise Declined("no target multiplies run-time quantised convolutions faster than float", node)
        if x.dtype != "f32" or weight.dtype != "f32":
            raise Declined(f"its operands are {x.dtype} and {weight.dtype}; expected f32", node)
        if weight.constant is None or weight.constant.size == 0:
            raise Declined("its weight is empty", node)
        if self.activations == "static" and x not in shared and (stats is None or x.name not in stats):
            raise Declined("no statistics of what it reads", node)
        samples = stats.of(x.name).samples if stats is not None and x.name in stats else None
        correcting = self.bias_correction and samples is not None and node.op.name == "linear"
        exact = weight_matrix(node) if correcting else None
        if weight not in weights:
            weights[weight] = self._weight(node, weight, rewriter, report, samples)
        rewriter.set_operand(node, 1, weights[weight])
        if self.activations != "none":
            if x not in shared:
                shared[x] = self._activation(x, node, rewriter, stats, report)
            rewriter.set_operand(node, 0, shared[x])
        if exact is not None and samples is not None:
            self._correct_bias(node, rewriter, exact, samples)
        return True

    def _correct_bias(self, node: Node, rewriter: Rewriter, exact: np.ndarray, samples: np.ndarray) -> None:
        """bias += E[x W^T - Q(x) Q(W)^T] over the sampled rows."""
        made = node.operands[1].producer if node.operands[1] is not None else None
        bias = node.operand(2)
        if made is None or (bias is not None and not bias.is_constant):
            return
        codes, scale = (v.constant for v in made.operands[:2] if v is not None)
        assert codes is not None and scale is not None
        rows = codes.array().astype(np.float64)
        rows = rows.T if node.attributes.get("transposed", False) else rows
        x = samples.astype(np.float64)
        seen = x if self.activations == "none" else _rounded(x, node.operands[0])
        error = x.mean(0) @ exact.T - seen.mean(0) @ (rows * scale.wide()[:, None]).T
        old = bias.constant.wide() if bias is not None and bias.constant is not None else np.zeros(len(error))
        name = bias.name if bias is not None else f"{node.result.name}.bias"
        rewriter.set_operand(node, 2, rewriter.constant(Constant(old + error, "f32", error.shape), name))

    def _weight(
        self, node: Node, weight: Value, rewriter: Rewriter, report: PassReport, samples: np.ndarray | None
    ) -> Value:
        assert weight.constant is not None
        data = weight.constant.wide()
        if not np.isfinite(data).all():
            raise PlanishError(f"weight '{weight.name}': holds NaN or infinity", where=place(node))
        turned = node.op.name == "linear" and bool(node.attributes.get("transposed", False))
        axis = int(turned or (node.op.name == "gemm" and not node.attributes.get("trans_b", False)))
        rows = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
        scale = choose_weight_scale(rows, self.weight_clip).astype(np.float32).astype(np.float64)
        if self.solver == "gptq" and samples is not None and node.op.name != "conv":
            codes, _ = gptq(rows, scale, 127, hessian(samples))
        else:
            codes = round_to_nearest(rows, scale, 127)
        report.figures.setdefault("weights", {})[weight.name] = {"sqnr_db": sqnr(rows, codes * scale[:, None])}
        folded = np.moveaxis(codes.reshape(np.moveaxis(data, axis, 0).shape), 0, axis).astype(np.int8)
        operands = [
            rewriter.constant(Constant.of(folded), f"{weight.name}.codes"),
            rewriter.constant(Constant(scale, "f32", scale.shape), f"{weight.name}.scale"),
        ]
        made = rewriter.insert(
            "dequantize",
            operands,
            {"axis": axis},
            before=node,
            names=[f"{weight.name}.dequantized"],
            source=node.source,
        )
        return made.result

    def _activation(self, x: Value, node: Node, rewriter: Rewriter, stats: Stats | None, report: PassReport) -> Value:
        # behind the producer: every reader comes later
        before = x.producer._next if x.producer is not None else rewriter.graph._first
        if self.activations == "static":
            assert stats is not None
            scale, zero = choose_static_range(stats.of(x.name), self.static_range, self.percentile)
            constants = [
                rewriter.constant(Constant.of(np.float32(scale)), f"{x.name}.scale"),
                rewriter.constant(Constant.of(np.uint8(zero)), f"{x.name}.zero"),
            ]
            codes = rewriter.insert(
                "quantize",
                [x, *constants],
                {"dtype": "u8"},
                before=before,
                names=[f"{x.name}.codes"],
                source=node.source,
            )
            operands: list[Value | None] = [codes.result, *constants]
        else:
            attributes: dict[str, Attribute] = {}
            if self.activations == "token":
                floor = self._floor(x, stats)
                attributes = {"granularity": "token"} | ({"symmetric": True} if floor is None else {"floor": floor})
            codes = rewriter.insert(
                "dynamic_quantize", [x], attributes, before=before,
                names=[f"{x.name}.codes", f"{x.name}.scale", f"{x.name}.zero"], source=node.source,
            )  # fmt: skip
            operands = list(codes.results)
        made = rewriter.insert(
            "dequantize", operands, before=before, names=[f"{x.name}.dequantized"], source=node.source
        )
        if stats is not None and x.name in stats:
            samples = stats.of(x.name).samples.astype(np.float64)
            figure = {"sqnr_db": sqnr(samples, _rounded(samples, made.result))}
            report.figures.setdefault("activations", {})[x.name] = figure
        return made.result

    def _floor(self, x: Value, stats: Stats | None) -> float | None:
        """The bound below zero of an activation that hardly falls below it; None: unknown, or it does."""
        if stats is None or x.name not in stats:
            return None
        record = stats.of(x.name)
        floor = row_floor(float(record.minimum.min()), float(record.maximum.max()))
        return None if floor is None else float(np.float32(floor))

    def _table(self, node: Node, rewriter: Rewriter, report: PassReport) -> bool:
        table, ids = node.operands[0], node.operands[1]
        if table is None or not table.is_constant or table.dtype != "f32" or table.rank != 2:
            return False
        assert table.constant is not None
        rows, width = table.constant.shape
        if rows < self.min_rows or width == 1:  # a scale for each row would not be smaller
            return False
        if len(table.users) > 1:
            raise Declined("its table has other readers (a tied head)", node)
        data = table.constant.wide()
        if not np.isfinite(data).all():
            raise PlanishError(f"table '{table.name}': holds NaN or infinity", where=place(node))
        scale = choose_weight_scale(data, self.weight_clip).astype(np.float32).astype(np.float64)[:, None]
        codes = round_to_nearest(data, scale[:, 0], 127)
        report.figures.setdefault("weights", {})[table.name] = {"sqnr_db": sqnr(data, codes * scale)}
        held = rewriter.constant(Constant.of(codes.astype(np.int8)), f"{table.name}.codes")
        scales = rewriter.constant(Constant(scale, "f32", scale.shape), f"{table.name}.scale")
        row = rewriter.insert("embedding", [held, ids], before=node, source=node.source)
        wide = rewriter.insert("cast", [row.result], {"to": "f32"}, before=node, source=node.source)
        factor = rewriter.insert("embedding", [scales, ids], before=node, source=node.source)
        product = rewriter.insert("mul", [wide.result, factor.result], before=node, source=node.source)
        rewriter.replace_node(node, product.result)
        return True


def _rounded(samples: np.ndarray, dequantised: Value | None) -> np.ndarray:
    """The samples as the readers of `dequantised` see them, by the rows of the two nodes before it."""
    made = dequantised.producer if dequantised is not None else None
    codes = made.operands[0].producer if made is not None and made.operands[0] is not None else None
    assert made is not None and codes is not None
    wide = Wide(torch.float64)
    held = [v.constant.tensor(torch.float64) for v in codes.operands[1:] if v is not None and v.constant is not None]
    results = codes.op.evaluate(codes, [torch.from_numpy(samples), *held], wide)
    operands = [*results, *held] if len(results) == 1 else results  # static: scale and zero are constants
    rounded: np.ndarray = made.op.evaluate(made, operands, wide)[0].numpy()
    return rounded
