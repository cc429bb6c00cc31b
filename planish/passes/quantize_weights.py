"""The weight of a linear or convolution as a matrix [outputs, inputs], its codes, and their way into the graph.

    W ~ (c - z) d        d, z of the format's blocks: along a row for a linear; of a kernel, along the input
                         channels of each tap if the format has groups

A weight that was split by value (`dequantize_split` of a float) is quantised cluster by cluster, each from its own
elements alone, in one tensor or in the parts that several nodes read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Node, Value
from planish.ir.qnodes import by_columns, insert_dequantize
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.rounding import quantize_array
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import PassReport, place
from planish.passes.gptq import gptq
from planish.passes.solvers import Clip, decibels

CHUNK = 32768  # rows of a weight that are rounded at once
KEPT = 0.6  # of the largest element of a row: what rounding to 2 bits leaves
SHOWN = 64  # rows of a weight by which the error of its output is judged for the report

Curvature = Callable[[], torch.Tensor | None]  # H of what a linear reads; None: unknown


def split_of(weight: Value | None) -> Node | None:
    """The `dequantize_split` that makes a weight from constant floats and clusters; None: it is no such weight."""
    made = weight.producer if weight is not None else None
    if made is None or made.op.name != "dequantize_split":
        return None
    codes, ids = made.operands[0], made.operands[1]
    if codes is None or ids is None or codes.constant is None or ids.constant is None:
        return None
    return made if codes.dtype in WIDE_FLOATS else None


def matrix_of(node: Node, data: np.ndarray, form: Format) -> np.ndarray:
    """The weight of a node as rows [rows, columns] whose blocks lie along the columns."""
    if node.op.name != "conv":
        return np.ascontiguousarray(data.T) if by_columns(node) else data
    if form.granularity != "group":
        return data.reshape(len(data), -1)
    return np.moveaxis(data, 1, -1).reshape(-1, data.shape[1])


def as_weight(node: Node, q: QTensor, shape: tuple[int, ...]) -> QTensor:
    """A quantised matrix of `matrix_of` as the node's weight of that shape."""
    if node.op.name != "conv":
        return q.transposed() if by_columns(node) else q
    if q.block is None:
        ids = None if q.clusters is None else q.clusters.reshape(shape)
        return replace(q, codes=q.codes.reshape(shape), clusters=ids)

    def back(held: np.ndarray | None, lead: int) -> np.ndarray | None:
        if held is None:
            return None
        whole = held.reshape(*held.shape[:lead], shape[0], *shape[2:], -1)
        return np.ascontiguousarray(np.moveaxis(whole, -1, 1 + lead))

    lead = int(q.clusters is not None)
    codes, scale = back(q.codes, 0), back(q.scale, lead)
    assert codes is not None and scale is not None
    return replace(q, codes=codes, scale=scale, zero=back(q.zero, lead), clusters=back(q.clusters, 0))


@dataclass
class Weights:
    """Quantises the weights of one graph, each once however many nodes read it.

    Attributes:
        form: the format.
        clip: how the range of a block is chosen.
        damping, act_order: of GPTQ.
        made: what stands for each weight.
    """

    form: Format
    clip: Clip
    damping: float
    act_order: bool
    rewriter: Rewriter
    report: PassReport
    made: dict[Value, Value] = field(default_factory=dict)

    def of(self, node: Node, curvature: Curvature | None) -> Value:
        """What the node reads for its weight.

        Args:
            curvature: for GPTQ; None: round to nearest.

        Raises:
            Declined: the format does not fit the weight.
            PlanishError: the weight is not finite, or GPTQ fails.
        """
        weight = node.operand(1)
        assert weight is not None
        if weight in self.made:
            return self.made[weight]
        split = split_of(weight)
        if split is None:
            assert weight.constant is not None
            if self.form.clusters > 1:
                raise Declined("its weight is not split: run split-layers before", node)
            q = self._rounded(node, weight, weight.constant.wide(), self.form, None, curvature)
            made = insert_dequantize(self.rewriter, q, weight.name, before=node, source=node.source)
        else:
            made = self._split(node, split, curvature)
        self.made[weight] = made
        return made

    def _split(self, node: Node, split: Node, curvature: Curvature | None) -> Value:
        """A split weight: the codes are shared by all of its parts."""
        source, held, ones, zero = (split.operand(i) for i in range(4))
        assert source is not None and source.constant is not None and held is not None and held.constant is not None
        if ones is None or ones.constant is None or zero is not None or (ones.constant.wide() != 1).any():
            raise Declined("its split weight has scales already", node)
        clusters = len(ones.constant.wide())
        if self.form.is_float or self.form.scale == "f8e8m0" or self.form.clusters not in (1, clusters):
            raise Declined(f"its weight is split into {clusters} clusters, which {self.form} cannot hold", node)
        index = split.attributes.get("index")
        if source not in self.made:
            form = replace(self.form, clusters=clusters)
            ids = held.constant.array().astype(np.uint8)
            # the parts read one value and add up: what one element errs, those of another part may make up for
            q = self._rounded(node, source, source.constant.wide(), form, ids, curvature)
            self.made[source] = insert_dequantize(self.rewriter, q, source.name, before=node, source=node.source)
        packed = self.made[source]
        if index is None:
            return packed
        made = packed.producer
        assert made is not None
        return self.rewriter.insert(
            "dequantize_split", made.operands, {**made.attributes, "index": index}, before=node,
            names=[f"{split.result.name}.dequantized"], source=node.source,
        ).result  # fmt: skip

    def _rounded(
        self,
        node: Node,
        weight: Value,
        data: np.ndarray,
        form: Format,
        ids: np.ndarray | None,
        curvature: Curvature | None,
    ) -> QTensor:
        if not np.isfinite(data).all():
            raise PlanishError(f"weight '{weight.name}': holds NaN or infinity", where=place(node))
        if node.op.name == "conv" and form.block is not None and data.shape[1] < form.block:
            raise Declined(f"its kernel has {data.shape[1]} input channels, less than a group of {form}", node)
        rows = matrix_of(node, data, form)
        clusters = None if ids is None else matrix_of(node, ids, form)
        check_reach(node, rows, form, clusters)
        q = round_rows(rows, form, self.clip, clusters)
        h = curvature() if curvature is not None and node.op.name != "conv" else None
        figure: dict[str, float] = {}
        if h is not None:
            before = _output_sqnr(rows, q, h)
            solved = gptq(rows, q, form, h, damping=self.damping, act_order=self.act_order)
            q = solved.weight
            figure = {
                "loss": solved.loss, "damping": solved.damping, "output_sqnr_db_rounded": before,
                "output_sqnr_db": _output_sqnr(rows, q, h),
            }  # fmt: skip
        figure = {"sqnr_db": weight_sqnr(rows, q), "bits": round(q.bits, 4), **figure}
        self.report.figures.setdefault("weights", {})[weight.name] = figure
        return as_weight(node, q, data.shape)


def rounds_alone(form: Format) -> bool:
    """True if a row of a weight is rounded by itself, whatever the other rows hold."""
    return form.granularity in ("channel", "group") and form.scale != "f8e4m3fn"


def round_rows(rows: np.ndarray, form: Format, clip: Clip, clusters: np.ndarray | None = None) -> QTensor:
    """`quantize_array`, some rows at a time where they share no scale: a large table takes little more than itself."""
    if len(rows) <= CHUNK or not rounds_alone(form):
        return quantize_array(rows, form, clip, clusters=clusters)
    parts = [
        quantize_array(rows[i : i + CHUNK], form, clip, clusters=None if clusters is None else clusters[i : i + CHUNK])
        for i in range(0, len(rows), CHUNK)
    ]

    def joined(held: list[np.ndarray | None], axis: int) -> np.ndarray | None:
        found = [h for h in held if h is not None]
        return np.concatenate(found, axis) if found else None

    lead = int(clusters is not None)
    codes, scale = joined([p.codes for p in parts], 0), joined([p.scale for p in parts], lead)
    assert codes is not None and scale is not None
    return replace(parts[0], codes=codes, scale=scale, zero=joined([p.zero for p in parts], lead), clusters=clusters)


def check_reach(node: Node, rows: np.ndarray, form: Format, clusters: np.ndarray | None = None) -> None:
    """Raise `Declined` if the largest element is lost: beyond the largest scale of the format, or below the least."""
    row, column = np.unravel_index(np.argmax(np.abs(rows)), rows.shape)
    part, size = slice(row, row + 1), float(abs(rows[row, column]))
    q = quantize_array(rows[part], form, clusters=None if clusters is None else clusters[part])
    if abs(float(q.dequantize()[0, column])) < KEPT * size:
        raise Declined(f"its weight reaches {size:.3g}, which scales of {form.scale} in {form} cannot hold", node)


def some_rows(q: QTensor, chosen: np.ndarray | slice) -> QTensor:
    """Some rows of a quantised matrix."""
    kept = {"codes": q.codes[chosen]}
    if q.clusters is not None:
        kept["clusters"] = q.clusters[chosen]
    if q.block is not None or q.axis == 0:
        lead = (slice(None),) if q.clusters is not None else ()
        kept["scale"] = q.scale[(*lead, chosen)]
        if q.zero is not None:
            kept["zero"] = q.zero[(*lead, chosen)]
    return replace(q, **kept)  # type: ignore[arg-type]


def weight_sqnr(rows: np.ndarray, q: QTensor) -> float:
    """`sqnr` of a weight, some rows at a time."""
    signal = noise = 0.0
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        signal += float((rows[part] ** 2).sum())
        noise += float(((rows[part] - some_rows(q, part).dequantize()) ** 2).sum())
    return decibels(signal, noise)


def _output_sqnr(rows: np.ndarray, q: QTensor, h: torch.Tensor) -> float:
    """Signal over noise of the output, dB, from H and up to 64 rows: w H w^T over d H d^T."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, SHOWN).astype(np.int64))
    exact = torch.from_numpy(rows[chosen])
    error = exact - torch.from_numpy(some_rows(q, chosen).dequantize())
    return decibels(*(max(float(((x @ h) * x).sum()), 0.0) for x in (exact, error)))
