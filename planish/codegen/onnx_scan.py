"""How the selective scan is written for ONNX: the standard operator Scan over time.

state [B, D, N] = 0;  for t:  state = exp(delta_t a) state + delta_t b_t u_t;  y_t = sum_n c_t state
y = y + skip u
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, NodeProto, TypeProto, ValueInfoProto, helper

from planish.codegen.onnx_emission import Emission, emitter
from planish.ir.constant import Constant
from planish.ir.graph import Blob, Node
from planish.ir.types import onnx_enum


@emitter("selective_scan")
def _selective_scan(node: Node, e: Emission) -> None:
    u, delta, a, b, c, skip = (node.operand(i) for i in range(6))
    if u is None or delta is None or a is None or b is None or c is None:
        raise e.fail(node, "an absent operand is not possible")
    if e.since("Unsqueeze") < 13:
        raise e.fail(node, "a scan over time is not possible")
    shapes = [(u, 0, 2), (a, 1, 2)]
    sizes = [
        e.add("Slice", [e.add("Shape", [e.name(x)]), e.ints((start,), "start"), e.ints((end,), "end")])
        for x, start, end in shapes
    ]
    dtype = u.dtype or "f32"
    zero = Constant(np.zeros(1), dtype, (1,))
    state = e.add("ConstantOfShape", [e.add("Concat", sizes, axis=0)], value=zero, hint="state")
    inputs = [state, e.name(u), e.name(delta), e.name(b), e.name(c)]
    body = _step(e, node, dtype, e.name(a))
    outputs = [e.fresh("last_state"), e.outputs(node)[0] if skip is None else e.fresh("scanned")]
    e.add(
        "Scan",
        inputs,
        outputs,
        body=Blob("onnx.GraphProto", body.SerializeToString()),
        num_scan_inputs=4,
        scan_input_axes=(2, 2, 2, 2),
        scan_output_axes=(2,),
    )
    if skip is not None:
        factor = e.add("Unsqueeze", [e.name(skip), e.ints((1,), "axes")])
        e.add("Add", [outputs[1], e.add("Mul", [factor, e.name(u)])], e.outputs(node))


def _step(e: Emission, node: Node, dtype: str, decay: str) -> GraphProto:
    """One step of the recurrence: (state [B, D, N], u, delta [B, D], b, c [B, N]) -> (state, y [B, D])."""
    made: list[NodeProto] = []
    last, row = e.ints((-1,), "axes"), e.ints((1,), "axes")

    def add(op_type: str, *inputs: str, hint: str = "") -> str:
        name = e.fresh(f"{node.result.name}_{hint or op_type.lower()}")
        made.append(helper.make_node(op_type, list(inputs), [name]))
        return name

    state, u, delta, b, c = (e.fresh(f"{node.result.name}_{n}") for n in ("state", "u", "delta", "b", "c"))
    step, one = add("Unsqueeze", delta, last), add("Unsqueeze", u, last)
    kept = add("Mul", add("Exp", add("Mul", step, decay)), state, hint="kept")
    new = add("Add", kept, add("Mul", add("Mul", step, add("Unsqueeze", b, row)), one), hint="next")
    y = add("Squeeze", add("MatMul", new, add("Unsqueeze", c, last)), last, hint="y")
    given = [_declared(state, dtype, 3)] + [_declared(name, dtype, 2) for name in (u, delta, b, c)]
    results = [_declared(new, dtype, 3), _declared(y, dtype, 2)]
    return helper.make_graph(made, "step", given, results)


def _declared(name: str, dtype: str, rank: int) -> ValueInfoProto:
    kind = TypeProto()
    kind.tensor_type.elem_type = onnx_enum(dtype)
    kind.tensor_type.shape.SetInParent()
    for _ in range(rank):
        kind.tensor_type.shape.dim.add()
    return helper.make_value_info(name, kind)
