"""Lowering: the quantised graph in the form that one target runs best.

`target=onnx` needs nothing: quantize / dequantize nodes are standard operators. `target=ort` rewrites
to what ONNX Runtime's CPU kernels are fast at (`planish.codegen.lower_ort`). `opset` is the version of
ONNX's default domain that the graph will be written at, where that was asked for: operators that it
does not have are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planish.ir.graph import Graph
from planish.passes.base import Context, Exactness, Pass, PassReport


@dataclass(frozen=True)
class Lower(Pass):
    """Rewrite quantised linears and attention to the forms of a target."""

    name = "lower"
    exactness = Exactness.LOSSY  # the same numbers up to the order of float operations; rounding may fall otherwise

    target: Literal["onnx", "ort"] = "onnx"
    opset: int | None = None  # none: the model's own, raised where that is faster

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.target == "ort":
            from planish.codegen.lower_ort import lower

            lower(graph, report, self.opset)
        return report
