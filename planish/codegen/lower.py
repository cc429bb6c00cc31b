"""Lowering: the quantised graph in the form that one target runs best.

`target=onnx` keeps to standard operators, in a form whose numbers an engine's optimiser does not change
(`planish.codegen.lower_onnx`). `target=ort` rewrites to what ONNX Runtime's CPU kernels are fast at
(`planish.codegen.lower_ort`). `opset` is the version of ONNX's default domain that the graph will be written at,
where that was asked for: operators that it does not have are not used.

`form` chooses the kernel of linears with weights of less than 8 bits and activations of 8 (W4A8) for `ort`:
`prefill` the integer product over many rows, `decode` MatMulNBits for few; `auto` takes the latter where the graph
says that there is one row. `accuracy_level` is MatMulNBits's own (`planish.codegen.ort_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planish.ir.graph import Graph
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.options import Range, option


@dataclass(frozen=True)
class Lower(Pass):
    """Rewrite quantised linears and attention to the forms of a target."""

    name = "lower"
    exactness = Exactness.LOSSY  # the same numbers up to the order of float operations; rounding may fall otherwise
    final = True

    target: Literal["onnx", "ort"] = "onnx"
    opset: int | None = None  # none: the model's own, raised where that is faster
    form: Literal["auto", "decode", "prefill"] = "auto"  # of 4-bit weights with 8-bit activations, for ort
    accuracy_level: int | None = option(None, Range(0, 4))  # of MatMulNBits; none: 4 for 8-bit activations, else 0

    def run(self, graph: Graph, context: Context) -> PassReport:
        from planish.codegen.onnx_emission import check_opset

        report = PassReport(self.name)
        if self.opset is not None:
            check_opset(self.opset)
        if self.target == "ort":
            from planish.codegen.lower_ort import lower

            lower(graph, report, self.opset, form=self.form, level=self.accuracy_level)
        else:
            from planish.codegen.lower_onnx import lower as lower_portable

            lower_portable(graph, report)
        return report
