"""Which nodes go into which kernel: the rules of `planish.codegen.select`, one after the other.

`Fusion` joins nodes in a partition that keeps the graph of regions acyclic, so that each rule may try what it likes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from planish.codegen.partition import Partition
from planish.codegen.select_gemm import Linear, fits_tile
from planish.codegen.select_rows import prologue
from planish.codegen.select_sites import (
    BINARY,
    NORMS,
    QUANTISERS,
    RANK_LIMIT,
    UNARY,
    Left,
    WeightKind,
    fixed,
    is_view,
    left_of,
    linear_shape,
    narrow_linear,
    refuses_elementwise,
    refuses_rows,
    vector,
    weight_kind,
    width,
)
from planish.codegen.triton_rows import refusal
from planish.ir.graph import Graph, Node, Value

LINEARS = ("linear", "gemm", "matmul")
HEAVY = NORMS | {"hadamard", "gather", "reassemble"} | QUANTISERS  # more than elementwise work on a row


@dataclass(frozen=True)
class Options:
    """What may be fused.

    Attributes:
        closing: whether a gemm may end with steps on whole rows, run by the tile that finishes a block of rows.
        next_quantise: whether a gemm may quantise its result for the next one at all.
        norms: the widest row whose norm may be among closing steps. On a chip of many small cores there is none: the
            rows of a norm are spread over all of them.
    """

    closing: bool = True
    next_quantise: bool = True
    norms: int = 0


class Fusion:
    """The kernels of a graph.

    Attributes:
        linears: of each gemm, its linears.
        owned: the nodes of kernels.
        program: those of row programs, within gemms too.
        reasons: why a node was not fused.
    """

    def __init__(self, graph: Graph, options: Options) -> None:
        self.graph, self.options = graph, options
        self.given = set(graph.output_values())
        self.partition = Partition(graph)
        self.linears: list[list[Linear]] = []
        self.owned: set[Node] = set()
        self.program: set[Node] = set()
        self.reasons: dict[Node, str] = {}

    def run(self) -> None:
        """Apply the rules."""
        for node in self.partition.nodes:
            if node.op.name in LINEARS:
                self._linear(node)
        self._meet()
        for linears in reversed(self.linears):
            self._grow(linears)
        self._programs()

    def miss(self, node: Node, reason: str) -> None:
        """Note why a node is not fused; the first reason stays."""
        self.reasons.setdefault(node, reason)

    # -- gemms -----------------------------------------------------------------------------------

    def _linear(self, node: Node) -> None:
        kind = weight_kind(node)
        if kind is None:
            if all(fixed(v) for v in node.operands[1:]):
                self.miss(node, "its weight is not quantised")
            return
        left = left_of(node)
        shape = linear_shape(node)
        refusal = next((found for found in (kind, shape, left) if isinstance(found, str)), None)
        if isinstance(kind, WeightKind) and isinstance(shape, tuple) and isinstance(left, Left):
            refusal = _refuses_pair(left, kind, node, shape[1])
            if refusal is None:
                linear = Linear(node, left, kind, *shape)
                self.linears.append([linear])
                self.owned.add(node)
                self._branches(linear)
        if refusal is not None:
            self.miss(node, refusal)

    def _branches(self, linear: Linear) -> None:
        while linear.result not in self.given:
            users = list(dict.fromkeys(linear.result.users))
            if len(users) != 1 or users[0].op.name != "add" or users[0].operands[0] is users[0].operands[1]:
                return
            total = users[0]
            other = total.operands[1] if total.operands[0] is linear.result else total.operands[0]
            up = other.producer if other is not None else None
            rank = narrow_linear(up)
            if up is None or isinstance(rank, str) or other is None or other in self.given or len(other.users) != 1:
                return
            left = width(up.operand(0))
            if left != rank or rank >= linear.columns or other.shape != linear.result.shape:
                return
            if rank > RANK_LIMIT:
                self.miss(up, f"a branch of {rank} columns; a kernel takes {RANK_LIMIT}")
                return
            if total.result.dtype != linear.result.dtype or not self._join([linear.node, up, total]):
                return
            linear.branches.append((up, total))

    def _join(self, nodes: Iterable[Node]) -> bool:
        nodes = list(nodes)
        if not self.partition.join(nodes):
            return False
        self.owned.update(nodes)
        return True

    def _meet(self) -> None:
        """One gemm of two linears whose results meet in an elementwise node, or of the two parts of a merged one."""
        home: dict[Node, list[Linear]] = {linears[0].node: linears for linears in self.linears}
        of: dict[Value, Linear] = {}
        for linears in self.linears:
            of[linears[0].result] = linears[0]
            of |= {part.result: part for part in linears[0].parts()}
        for node in self.partition.nodes:
            if node.op.name not in BINARY or refuses_elementwise(node) is not None:
                continue
            sides = [_trace(v, node, of, self.given) for v in node.operands if v is not None and not v.is_constant]
            if len(sides) != 2 or sides[0] is None or sides[1] is None:
                continue
            one, chain = sides[0]
            two, other = sides[1]
            first, second = home[one.node], home[two.node]
            if one is two or one.left.value is not two.left.value:
                continue  # a sum of two layers: an epilogue with a residual
            if one.weight != two.weight or one.outputs != two.outputs or one.left.decoder is not two.left.decoder:
                self.miss(node, "its two linears differ in their width, or in the format of their weights")
                continue
            parted = one.split is not None or two.split is not None
            if len(first) != 1 or len(second) != 1 or (first is second) != parted:
                continue  # three of a kind, or a part of a merged linear and another one
            if parted and one.outputs + two.outputs != first[0].outputs:
                continue  # a merged linear of more than two
            if self._join([*one.nodes, *two.nodes, *chain, *other, node]):
                second.clear()
                first[:] = sorted((one, two), key=lambda linear: (self.partition.place[linear.node], linear.first))
        self.linears = [linears for linears in self.linears if linears]
        self.linears.sort(key=lambda linears: self.partition.place[linears[-1].node])

    def _grow(self, linears: list[Linear]) -> None:
        """Take up the elementwise nodes behind a gemm."""
        first = linears[0]
        done: set[Value] = set()
        while True:
            members = self.partition.members(first.node)
            inside = {v for node in members for v in node.results}
            waiting = [v for node in members for v in node.results if v not in done and v not in self.given]
            waiting = [v for v in waiting if any(u not in members for u in v.users)]
            if not waiting:
                return
            value = waiting[0]
            done.add(value)
            users = [u for u in dict.fromkeys(value.users) if u not in members]
            reasons = {u: self._refuses_epilogue(u) for u in users}
            if any(r is not None for r in reasons.values()):
                for user, reason in reasons.items():
                    stopped = "what it reads is also read by others, which do not fuse"
                    if user.op.name in UNARY or user.op.name in BINARY:
                        self.miss(user, reason or stopped)
                continue
            if not self._join([first.node, *users]):
                for user in users:
                    self.miss(user, "its other operand depends on the kernel's result through other regions")
                continue
            for user in users:
                self._sides(first.node, user, inside)

    def _refuses_epilogue(self, node: Node) -> str | None:
        if node in self.owned:
            return "it is part of another kernel"
        if is_view(node):
            return None if self._leads_on(node) else "nothing elementwise is behind it"
        return refuses_elementwise(node)

    def _leads_on(self, view: Node) -> bool:
        """True if an epilogue can go on behind another shape of its rows."""
        if view.result in self.given:
            return False
        return any(self._leads_on(u) if is_view(u) else refuses_elementwise(u) is None for u in view.result.users)

    def _sides(self, anchor: Node, node: Node, inside: set[Value]) -> None:
        """Take up the elementwise nodes that make the other operand of an epilogue's node, up to another kernel's."""
        for operand in node.operands:
            made = operand.producer if operand is not None else None
            if operand is None or made is None or operand in inside or made in self.owned or operand in self.given:
                continue
            if refuses_elementwise(made) is not None or set(operand.users) != {node} or self._ends_a_kernel(made):
                continue
            if sum(v is not None and not v.is_constant for v in made.operands) == 1 and self._join([anchor, made]):
                self._sides(anchor, made, inside)

    def _ends_a_kernel(self, node: Node) -> bool:
        """True if an elementwise node reads the result of a kernel, through others that nothing else reads."""
        while True:
            computed = [v for v in node.operands if v is not None and not v.is_constant]
            made = computed[0].producer if len(computed) == 1 else None
            if made is None or made in self.owned:
                return made is not None
            if refuses_elementwise(made) is not None and not is_view(made):
                return False
            node = made

    # -- row programs ----------------------------------------------------------------------------

    def _programs(self) -> None:
        anchors: list[Node] = []
        for linears in self.linears:
            for linear in linears:
                made = linear.left.value.producer
                lefts = [up.operand(0) for up, _ in linear.branches]
                if made is not None and made not in self.owned:
                    if linear.left.is_codes:
                        anchors += self._rows(made)
                    else:
                        anchors += self._heavy(made)
                for left in lefts:
                    narrow = left.producer if left is not None else None
                    if narrow is not None and narrow not in self.owned and self._narrow(narrow):
                        anchors.append(narrow)
        anchors = sorted(dict.fromkeys(anchors), key=self.partition.place.__getitem__)
        for anchor in anchors:
            self._backwards(anchor)
        for anchor in self._merged(anchors):
            if self._written(anchor):
                self._absorbed(anchor)

    def _written(self, anchor: Node) -> bool:
        """True if a row program can be written as a kernel; else its nodes are left to the graph."""
        members = self.partition.members(anchor)
        kernel, _ = prologue(members, ())
        reason = refusal(kernel.steps, kernel.columns)
        if reason:
            self.miss(anchor, reason)
            self.owned -= set(members)
            self.program -= set(members)
        return not reason

    def _rows(self, quantiser: Node) -> list[Node]:
        refusal = refuses_rows(quantiser)
        if refusal is not None:
            self.miss(quantiser, refusal)
        return [] if refusal is not None else [quantiser]

    def _narrow(self, node: Node) -> bool:
        """True if the left of a branch is made from rows."""
        x = node.operand(0)
        if node.op.name == "linear":
            rank = narrow_linear(node)
            inner = width(x)
            return isinstance(rank, int) and inner is not None and rank == width(node.result) and rank < inner
        return node.op.name == "gather" and refuses_rows(node) is None

    def _heavy(self, node: Node) -> list[Node]:
        """The node behind which a linear reads floats, if what is there is more than elementwise."""
        while is_view(node):
            made = node.operands[0].producer if node.operands[0] is not None else None
            if made is None or made in self.owned:
                return []
            node = made
        if refuses_rows(node) is not None:
            return []
        waiting, seen = [node], {node}
        while waiting:
            made = waiting.pop()
            if made.op.name in HEAVY:
                return [node]
            for operand in made.operands:
                before = operand.producer if operand is not None else None
                if before is None or before in seen or before in self.owned:
                    continue
                if refuses_rows(before) is not None and not is_view(before):
                    continue
                seen.add(before)
                waiting.append(before)
        self.miss(node, "only elementwise work before a linear with float activations: nothing to quantise")
        return []

    def _backwards(self, anchor: Node) -> None:
        """Take up the row ops that make what a row program reads."""
        self.owned.add(anchor)
        self.program.add(anchor)
        self.reasons.pop(anchor, None)
        waiting = [v for v in anchor.operands[:1] if v is not None]
        while waiting:
            value = waiting.pop()
            made = value.producer
            if made is None or (made in self.owned and made not in self.program):
                continue
            if made in self.program:
                self.partition.join([anchor, made])
                continue
            if not (self._origin_fuses(made) if is_view(made) else _is_row_op(made)) or not self._join([anchor, made]):
                continue
            self.program.add(made)
            self.reasons.pop(made, None)
            waiting += [v for v in made.operands if width(v) is not None and v is not None and not v.is_constant]

    def _origin_fuses(self, view: Node) -> bool:
        """True if what a view shows is made by a kernel, or can be."""
        made: Node | None = view
        while made is not None and is_view(made):
            first = made.operands[0]
            made = first.producer if first is not None else None
        return made is not None and (made in self.owned or _is_row_op(made))

    def _merged(self, anchors: list[Node]) -> list[Node]:
        """An anchor of each row program, after those that read the same rows have become one."""
        readers: dict[Value, Node] = {}
        for anchor in anchors:
            for value in self._sources(anchor):
                other = readers.setdefault(value, anchor)
                if other is not anchor:
                    self.partition.join([other, anchor])
        return list({self.partition.group(anchor): anchor for anchor in anchors}.values())

    def _sources(self, anchor: Node) -> list[Value]:
        """The values that the group of a node reads from outside."""
        members = self.partition.members(anchor)
        inside = {v for node in members for v in node.results}
        found = [v for n in members for v in n.operands if v is not None and not v.is_constant and width(v) is not None]
        return list(dict.fromkeys(v for v in found if v not in inside))

    def _absorbed(self, anchor: Node) -> None:
        """Make a row program the end of the gemm that makes the rows it reads, if there is one such gemm."""
        sources, members = self._sources(anchor), self.partition.members(anchor)
        makers = {v.producer for v in sources}
        gemms = {self.partition.group(linears[0].node): linears[0].node for linears in self.linears}
        found = {self.partition.group(m) for m in makers if m is not None and self.partition.group(m) in gemms}
        if len(found) != 1:
            return
        target = gemms[found.pop()]
        what, norms = members[-1], [node for node in members if node.op.name in NORMS]
        if not self.options.next_quantise:
            self.miss(what, "not fused into the gemm that makes its rows: switched off")
        elif norms and not (self.options.closing and (width(sources[0]) or math.inf) <= self.options.norms):
            self.miss(norms[0], "a norm starts a kernel of its own, whose rows are spread over the whole chip")
        elif len(sources) != 1:
            self.miss(what, "it reads other rows beside those of the gemm")
        elif not self.options.closing and not all(fits_tile(node) for node in members):
            self.miss(what, "it needs whole rows, and closing steps are switched off")
        elif not self.partition.join([target, *members]):
            self.miss(what, "fused with the gemm that makes its rows, it would have to wait for itself")


def _trace(value: Value, reader: Node, of: dict[Value, Linear], given: set[Value]) -> tuple[Linear, list[Node]] | None:
    """The linear that a value comes from through elementwise nodes that nothing else reads."""
    chain: list[Node] = []
    while value not in given and set(value.users) == {reader}:
        found = of.get(value)
        if found is not None:
            return found, chain
        made = value.producer
        if made is None or (refuses_elementwise(made) is not None and not is_view(made)):
            return None
        computed = [v for v in made.operands if v is not None and not v.is_constant]
        if len(computed) != 1:
            return None
        chain.append(made)
        value, reader = computed[0], made
    return None


def _refuses_pair(left: Left, weight: WeightKind, node: Node, outputs: int) -> str | None:
    """Why no gemm multiplies such an activation by such a weight; None: one does."""
    bias = node.operand(2)
    if bias is not None and vector(bias, outputs) is None:
        return "its bias is no constant vector"
    if left.group and weight.group and max(left.group, weight.group) % min(left.group, weight.group):
        return f"groups of {left.group} columns of the activation and of {weight.group} of the weight"
    return None


def _is_row_op(node: Node) -> bool:
    """True for a step of a row program that is no quantise: those are where programs end."""
    return node.op.name not in QUANTISERS and refuses_rows(node) is None
