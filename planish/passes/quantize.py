"""Put low-bit numbers on weights, activations and embedding tables.

    weight      w ~ (c - z) d        per tensor, output channel or group of N inputs
    activation  x ~ (c - z) d        per tensor, row (token) or group of N channels; calibrated (static) or at run time
    table       e ~ (c - z) d        per row or group of a row

The formats are those of `planish.ir.formats`: `weights=int4:g128 activations=int8:token embeddings=int4:g32`. The
graph afterwards holds explicit quantise and dequantise nodes around the same linears: every target lowers that form.
What several nodes read is quantised once; a table that a linear reads too (a tied head) in the format of
`embeddings`. Lossy: reports the signal-to-noise ratio of each weight and, where there are statistics, of each
activation. Linears that an earlier pass marked to stay in float (low-rank branches, outlier columns) do.

`sites` chooses linears by what they read: the channels of a residual stream, hidden channels of a feed-forward part,
values of an attention; `skip` and `only` by name.

With calibration, `solver=gptq` picks the weight codes so that the output of the layer is kept
(`planish.passes.gptq`). `inputs=quantised` takes what the layer will read from the graph as it is quantised so far, in
one sweep over the calibration batches (`planish.ir.sweep`); `inputs=float` what it reads now. `bias-correction` adds
to each bias the mean error of its output over the samples, E[x W^T - Q(x) Q(W)^T] (Nagel et al., arXiv 1906.04721).
Neither costs anything at run time. `clip=mse` takes for each block the fraction of its range with the least squared
error; `static-range` does the like for calibrated activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node, Value
from planish.ir.qnodes import qtensor_of, weight_of
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Context, Exactness, Pass, PassReport, kept_float, place
from planish.passes.channels import Kind
from planish.passes.named import check_patterns, require_named
from planish.passes.options import Range, option
from planish.passes.quantize_activations import Activations, as_read, is_rounded
from planish.passes.quantize_dtypes import Widening
from planish.passes.quantize_inputs import Inputs
from planish.passes.quantize_sites import check_form, kinds_read
from planish.passes.quantize_tables import insert_table, look_up, reads_as_rows, round_table
from planish.passes.quantize_weights import Weights, split_of
from planish.passes.sites import READERS, weight_matrix
from planish.passes.solvers import Clip, StaticRange


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise linears, convolutions and embedding tables."""

    name = "quantize"
    exactness = Exactness.LOSSY
    gives = frozenset({"quantised"})

    weights: str = "int8:channel"  # a format, or none
    activations: str = "none"  # a format, or none
    embeddings: str = "int8:channel"  # a format, or none
    solver: Literal["rtn", "gptq"] = "rtn"  # gptq needs calibration
    inputs: Literal["float", "quantised"] = "float"  # for gptq: what a linear reads
    clip: Clip = "max"
    damping: float = option(0.01, Range(above=0))  # of gptq, a fraction of the mean of diag(H)
    act_order: bool = True  # gptq: the columns with the largest inputs first
    bias_correction: bool = False  # needs statistics
    static_range: StaticRange = "min-max"
    percentile: float = option(99.99, Range(above=0, most=100))  # percent of the elements inside the range
    min_rows: int = option(256, Range(0))  # of an embedding table worth quantising
    skip: tuple[str, ...] = ()  # regular expressions: nodes whose source or result name matches stay float
    only: tuple[str, ...] = ()  # if there are any: nodes that match none stay float
    sites: tuple[Kind, ...] = ()  # if there are any: linears that read other channels stay float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", "activations", "embeddings"):
            check_form(self, name)
        check_patterns(self, "skip", "only")

    @property
    def needs_stats(self) -> bool:
        form = self.form_of("activations")
        return (form is not None and form.static) or self.solver == "gptq" or self.bias_correction

    @property
    def reads_data(self) -> bool:
        return self.solver == "gptq"

    def form_of(self, name: Literal["weights", "activations", "embeddings"]) -> Format | None:
        """The format in an option; None for the word none."""
        text = getattr(self, name)
        return None if text == "none" else Format.parse(text, "token" if name == "activations" else "channel")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.needs_stats and context.stats is None:
            raise PlanishError("pass 'quantize': needs calibration statistics", where=str(self))
        nodes = [n for n in graph.nodes if n.op.name in READERS or n.op.name == "embedding"]
        with Rewriter(graph) as rewriter:
            work = _Work(self, graph, context, rewriter, report, nodes)
            work.prepare()
            for node in context.progress(nodes, "quantize"):
                try:
                    require_named(node, self.skip, self.only)
                    done = work.table(node) if node.op.name == "embedding" else work.reader(node)
                except Declined as refusal:
                    report.decline(str(refusal), node)
                    continue
                if done:
                    report.applied.append(place(node))
        if not report.applied and not report.declined:
            report.misses.append("no linear, convolution or embedding with a constant float weight")
        if work.inputs is not None and work.inputs.note:
            report.notes.append(work.inputs.note)
        return report


@dataclass
class _Work:
    """What one run has made so far."""

    options: Quantize
    graph: Graph
    context: Context
    rewriter: Rewriter
    report: PassReport
    nodes: list[Node]
    weights: Weights | None = field(init=False, default=None)
    activations: Activations | None = field(init=False, default=None)
    inputs: Inputs | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        own = self.options
        self.stats = self.context.stats
        self.kept = kept_float(self.graph)
        self.kinds = kinds_read(self.graph) if own.sites else {}

    def prepare(self) -> None:
        """Move what will be quantised to f32, and set up what rounds it."""
        own, shared = self.options, (self.rewriter, self.report)
        form, active = own.form_of("weights"), own.form_of("activations")
        self._widen()
        if form is not None:
            self.weights = Weights(form, own.clip, own.damping, own.act_order, *shared)
        if active is not None:
            rule = (own.static_range, own.percentile)
            self.activations = Activations(active, *rule, self.rewriter, self.stats, self.report)
        if own.solver == "gptq" and self.weights is not None:
            read = [n.operands[0] for n in self.nodes if n.op.name != "embedding"]
            context = replace(self.context, stats=self.stats)
            self.inputs = Inputs(self.graph, [v for v in read if v is not None], context, own.inputs == "quantised")

    def _widen(self) -> None:
        """Compute in f32 what is of another float and can be quantised."""
        widening = Widening(self.rewriter)
        for node in self.nodes:
            try:
                require_named(node, self.options.skip, self.options.only)
                if node.op.name == "embedding":
                    if self._rows(node) is not None:
                        widening.node(node, [0])
                elif (pair := self._multiplied(node)) is not None:
                    self.check(node, *pair)
                    widening.node(node, [0, 1, 2])
            except Declined:
                continue  # said when it is its turn
        widening.finish()
        self.stats = widening.known(self.stats)
        self.kinds |= {new: self.kinds[old] for old, new in widening.wide.items() if old in self.kinds}

    def check(self, node: Node, x: Value, weight: Value) -> None:
        """Raise `Declined` unless a reader can be quantised."""
        active = self.options.form_of("activations")
        conv = node.op.name == "conv"
        split = split_of(weight)
        data = weight if split is None else split.operands[0]
        assert data is not None
        if node.result.name in self.kept:
            raise Declined("an earlier pass keeps it in float", node)
        if node.op.name == "gemm" and node.attributes.get("trans_a", False):
            raise Declined(f"this form of {node.op.name} is not quantised", node)
        if conv and active is not None and not active.static:
            raise Declined("no target multiplies run-time quantised convolutions faster than float", node)
        if conv and active is not None and active.granularity != "tensor":
            raise Declined("a convolution reads one range per tensor", node)
        if x.dtype not in WIDE_FLOATS or data.dtype not in WIDE_FLOATS:
            raise Declined(f"its operands are {x.dtype} and {data.dtype}; expected floats", node)
        if data.constant is not None and data.constant.size == 0:
            raise Declined("its weight is empty", node)
        if active is not None and is_rounded(x):
            raise Declined("what it reads is rounded already", node)
        if self.options.sites and self.kinds.get(x) not in self.options.sites:
            kind = self.kinds.get(x)
            raise Declined(f"reads {kind} channels" if kind else "reads channels of no space", node)

    def _multiplied(self, node: Node) -> tuple[Value, Value] | None:
        """The activation and the weight of a linear or convolution; None: not our business."""
        x, weight = node.operands[0], node.operand(1)
        if x is None or weight is None:
            return None
        no_weights = self.options.form_of("weights") is None
        rounded = no_weights and qtensor_of(weight) is not None  # by a run before
        if not (weight.is_constant or split_of(weight) is not None or rounded):
            return None
        return None if no_weights and qtensor_of(x) is not None else (x, weight)

    def reader(self, node: Node) -> bool:
        """Quantise what a linear or convolution multiplies; False: not our business."""
        pair = self._multiplied(node)
        if pair is None:
            return False
        x, weight = pair
        self.check(node, x, weight)
        stats = self.stats
        record = stats.along(x.name) if stats is not None else None
        samples = record.samples if record is not None else None
        correcting = self.options.bias_correction and samples is not None and node.op.name == "linear"
        exact = weight_matrix(node) if correcting and weight.is_constant else None
        read = x if self.activations is None else self.activations.of(x, node)
        inputs = self.inputs
        if self.weights is not None:
            solve = None if inputs is None else lambda: inputs.second_moment(x, read)
            made = self.weights.of(node, solve)
            self.rewriter.set_operand(node, 1, made)
        self.rewriter.set_operand(node, 0, read)
        if exact is not None and samples is not None:
            self._correct_bias(node, exact, samples, x)
        return self.weights is not None or self.activations is not None

    def _correct_bias(self, node: Node, exact: np.ndarray, samples: np.ndarray, x: Value) -> None:
        """bias += E[x W^T - Q(x) Q(W)^T] over the sampled rows."""
        q, bias = weight_of(node), node.operand(2)
        if bias is not None and not bias.is_constant:
            return
        rows = samples.astype(np.float64)
        read = node.operands[0]
        seen = rows if read is x or read is None else as_read(rows, x, read)
        error = rows.mean(0) @ exact.T - seen.mean(0) @ (exact if q is None else q.dequantize()).T
        old = bias.constant.wide() if bias is not None and bias.constant is not None else np.zeros(len(error))
        name = bias.name if bias is not None else f"{node.result.name}.bias"
        held = self.rewriter.constant(Constant(old + error, "f32", error.shape), name)
        self.rewriter.set_operand(node, 2, held)

    def _rows(self, node: Node) -> Value | None:
        """The table of an embedding that is worth quantising; None: not our business."""
        table = node.operands[0]
        if self.options.form_of("embeddings") is None or table is None or table.constant is None or table.rank != 2:
            return None
        rows, width = table.constant.shape
        few = rows < max(self.options.min_rows, 1) or width < 2  # of one column: a scale for each would not be smaller
        return None if few or table.dtype not in WIDE_FLOATS else table

    def table(self, node: Node) -> bool:
        """Quantise the table of an embedding; False: not our business."""
        form, table = self.options.form_of("embeddings"), self._rows(node)
        if form is None or table is None:
            return False
        made = {} if self.weights is None else self.weights.made
        if table not in made:
            others = [u for u in table.users if u.op.name != "embedding"]
            if any(not reads_as_rows(u, table) or not self._will_quantise(u) for u in others):
                raise Declined("its table has other readers (a tied head)", node)
            q = round_table(node, table, form, self.options.clip, self.report)
            made[table] = insert_table(self.rewriter, q, table, node, tied=bool(others))
        self.rewriter.replace_node(node, look_up(self.rewriter, made[table], node, table.name))
        return True

    def _will_quantise(self, node: Node) -> bool:
        x, weight = node.operands[0], node.operand(1)
        if self.weights is None or x is None or weight is None:
            return False
        try:
            require_named(node, self.options.skip, self.options.only)
            self.check(node, x, weight)
            if self.activations is not None and self.activations.form.static:
                return self.stats is not None and x.name in self.stats
        except Declined:
            return False
        return True
