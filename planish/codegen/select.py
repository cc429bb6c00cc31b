"""Region selection: the nodes of a quantised graph as kernels, and what is left to torch.

    plan = select(graph)

By rule, from ops, attributes and types alone:

1. A quantised linear is a **gemm**. It takes up the float branches that are added to it, the elementwise nodes
   behind it (activation functions, vectors, residual sums whose other addend is there already) and the elementwise
   nodes of that other addend. Two linears that read one activation and meet in an elementwise node (gate and up) are
   one gemm with two products.
2. What makes the codes that a gemm reads is a **prologue**: the quantise, the row ops before it (norm, affine,
   gather, rotation, residual sum), the low-rank down and the gather of outlying columns beside it. All readers share
   it; prologues that read the same rows are one. Before a linear with float activations it is one only if it does
   more than elementwise work.
3. A prologue without a norm that reads nothing but the result of one gemm becomes part of that gemm: on its tiles if
   each range lies in a tile (one scale, or groups), else as closing steps on finished rows.
4. The rest is left in **graph** regions. A join that would close a cycle of regions is not made.
"""

from __future__ import annotations

from planish.codegen.regions import Miss, Plan, Region
from planish.codegen.select_fuse import Fusion, Options
from planish.codegen.select_gemm import Linear, gemm
from planish.codegen.select_rows import prologue
from planish.codegen.select_sites import NORMS, decoders
from planish.ir.graph import Graph, Node

__all__ = ["Options", "select"]


def select(graph: Graph, options: Options | None = None) -> Plan:
    """Cut a graph into regions.

    Args:
        graph: after `quantize`; quantised tensors are constants behind `dequantize`.
    """
    fusion = Fusion(graph, options or Options())
    fusion.run()
    return _Regions(fusion).plan()


class _Regions:
    """The regions of a graph whose nodes are fused."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion, self.graph, self.partition = fusion, fusion.graph, fusion.partition
        self.linears, self.given = fusion.linears, fusion.given
        self.products = {linear.node for linears in fusion.linears for linear in linears}

    def plan(self) -> Plan:
        """The regions in order, and what did not fuse."""
        kernel_of = {self.partition.group(node) for node in self.fusion.owned}
        decoded: dict[int, list[Node]] = {}
        for linears in self.linears:
            for linear in linears:
                held = decoded.setdefault(self.partition.group(linear.node), [])
                held += decoders(linear.node.operands[1])
                held += [linear.left.decoder] if linear.left.decoder is not None else []
        repeated = {n for nodes in decoded.values() for n in nodes}
        parts: list[tuple[list[Node], bool]] = []
        for members in self.partition.ordered(self.fusion.owned):
            own = self.partition.group(members[0])
            if own in kernel_of:
                extra = [*dict.fromkeys(decoded.get(own, ()))]
                parts.append((sorted([*members, *extra], key=self.partition.place.__getitem__), True))
            elif members[0] in repeated and self._only_kernels_read(members[0], repeated):
                continue
            elif parts and not parts[-1][1]:
                parts[-1][0].extend(members)
            else:
                parts.append((list(members), False))
        by_group = {self.partition.group(linears[0].node): linears for linears in self.linears}
        homes: dict[Node, set[int]] = {}
        for index, (nodes, _) in enumerate(parts):
            for node in nodes:
                homes.setdefault(node, set()).add(index)
        regions: list[Region] = []
        for index, (nodes, is_kernel) in enumerate(parts):
            own_nodes = [n for n in nodes if n not in repeated] if is_kernel else nodes
            regions.append(self._region(index, nodes, own_nodes, is_kernel, by_group, homes))
        left = {node for nodes, is_kernel in parts if not is_kernel for node in nodes}
        for node in left:
            if node.op.name in NORMS or node.op.name == "hadamard":
                self.fusion.miss(node, "no kernel reads what it makes")
        misses = [Miss(n, r) for n, r in self.fusion.reasons.items() if n in left or n in self.fusion.program]
        misses.sort(key=lambda miss: self.partition.place[miss.node])
        return Plan(self.graph, tuple(regions), tuple(misses))

    def _only_kernels_read(self, node: Node, repeated: set[Node]) -> bool:
        return all(
            value not in self.given
            and all(u in self.products or (u in repeated and self._only_kernels_read(u, repeated)) for u in value.users)
            for value in node.results
        )

    def _region(
        self,
        index: int,
        nodes: list[Node],
        own: list[Node],
        is_kernel: bool,
        by_group: dict[int, list[Linear]],
        homes: dict[Node, set[int]],
    ) -> Region:
        place = self.partition.place
        nodes = sorted(nodes, key=place.__getitem__)
        inside = {v for node in nodes for v in node.results}
        operands = [v for node in nodes for v in node.operands if v is not None and not v.is_constant]
        inputs = tuple(dict.fromkeys(v for v in operands if v not in inside))
        outputs = tuple(
            v
            for node in own
            for v in node.results
            if v in self.given or any(homes[user] - homes.get(node, set()) for user in v.users)
        )
        if not is_kernel:
            return Region(f"graph_{index}", "graph", tuple(nodes), inputs, outputs)
        linears = by_group.get(self.partition.group(own[0]))
        if linears is None:
            kernel, border = prologue(own, outputs)
        else:
            core = {node for linear in linears for node in linear.nodes}
            epilogue = [n for n in own if n not in core and n not in self.fusion.program]
            kernel, border = gemm(linears, epilogue, [n for n in own if n in self.fusion.program], outputs)
        fused = (*(p.source for p in kernel.products), *(s.source for s in (*kernel.steps, *kernel.closing)))
        return Region(
            f"{kernel.kind}_{index}", kernel.kind, tuple(nodes), inputs, outputs, kernel, border.bound, border.known,
            border.views, fused,
        )  # fmt: skip
