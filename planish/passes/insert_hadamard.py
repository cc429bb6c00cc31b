"""Put an online Hadamard transform in front of what no weight can rotate.

    W x = (W H') (H x)              down: x is an elementwise product or activation, W a linear's weight     (R4)
    q . k = (H q) . (H k)           qk: behind rotary positions, on queries and keys alike                   (R3)

Exact over the reals, at the cost of an op `hadamard` for each site: n (f1 + f2 + ...) multiplications for n channels
(`planish.ir.hadamard.factors`). It is put in only where asked for, and not where rotate-channels does the same at no
cost. `sites=all` means every linear whose input no free rotation reaches, and the queries and keys.

    block    blocks of this many channels; none: all of them, or where there is no matrix of that order the largest
             blocks that divide them, and the report says so
    random   random signs in front of the transform

QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.hadamard import known
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, analyse
from planish.ir.transform import Mix
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.finite import require_finite_space
from planish.passes.hadamard import block_rotation, largest_order
from planish.passes.options import Range, option

FREE = "rotate-channels rotates it at no cost"


@dataclass(frozen=True, eq=False)
class _Site:
    """A tensor whose linear readers read `undone`, the inverse of `turned`, until their weights take that up."""

    value: Value
    readers: list[Node]
    turned: Value
    undone: Value
    transform: Mix
    block: int


@dataclass(frozen=True)
class InsertHadamard(Pass):
    """Online Hadamard transforms where rotations cannot be folded, only when asked for."""

    name = "insert-hadamard"
    exactness = Exactness.EXACT

    sites: Literal["down", "qk", "all"] = "down"
    block: int | None = option(None, Range(1))
    random: bool = False

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        rng = np.random.default_rng(context.seed)
        spaces = analyse(graph)
        if self.sites in ("down", "all"):
            self._linears(graph, spaces, rng, context, report)
        if self.sites in ("qk", "all"):
            self._queries_and_keys(graph, spaces, rng, context, report)
        if not report.applied and not report.declined:
            report.misses.append(f"no site of kind {self.sites}")
        return report

    # -- linears -------------------------------------------------------------------------------------

    def _linears(
        self, graph: Graph, spaces: ChannelSpaces, rng: np.random.Generator, context: Context, report: PassReport
    ) -> None:
        rewriter = Rewriter(graph)
        sites = []
        for value in list(dict.fromkeys(v for n in graph.nodes for v in n.results)):
            readers = [n for n in dict.fromkeys(value.users) if _contracts(n, value)]
            if not readers or (value.producer is not None and value.producer.op.name == "hadamard"):
                continue
            try:
                if self._wanted(value, spaces):
                    sites.append(self._insert(rewriter, value, readers, rng))
            except Declined as refusal:
                report.decline(refusal.reason, refusal.node or value)
        after = analyse(graph)
        for site in sites:
            try:
                _fold(rewriter, site, after)
            except Declined as refusal:
                report.decline(refusal.reason, refusal.node or site.value)
                rewriter.replace(site.undone, site.value)
                continue
            _follow(context, site)
            report.inserted += 1
            report.applied.append(f"%{site.value.name}: {self._said(site.transform.size, site.block)}")
        rewriter.sweep()

    def _wanted(self, value: Value, spaces: ChannelSpaces) -> bool:
        """True if the site is asked for and needs an op.

        Raises:
            Declined: it needs none, or its channels are not known.
        """
        assert value.rank is not None
        found = spaces.at(value, (value.rank - 1,), Act.ROTATE)
        producer = _maker(value)
        bent = any(b.node is producer and b.port < 0 for s in found for b in s.blockers)
        if self.sites == "down" and (not bent or producer is None or producer.op.family not in _ELEMENTWISE):
            return False
        if not found:
            raise Declined("the number of its channels is not known")
        if len(found) == 1 and found[0].admitted and len(found[0].blocks) == 1:
            raise Declined(FREE)
        return True

    def _insert(self, rewriter: Rewriter, value: Value, readers: list[Node], rng: np.random.Generator) -> _Site:
        size = value.shape[-1] if value.shape else None
        if not isinstance(size, int):
            raise Declined("the number of its channels is not known")
        block = self._block(size)
        assert value.producer is not None
        first = value.producer._next
        signs = rng.choice([-1.0, 1.0], size) if self.random else None
        options = _options(block if block != size else None, signs, value)
        turned = rewriter.insert("hadamard", [value], options, before=first, names=[f"{value.name}.hadamard"]).result
        back = {**options, "transpose": True}
        undone = rewriter.insert("hadamard", [turned], back, before=first).result
        for reader in readers:
            rewriter.set_operand(reader, 0, undone)
        return _Site(value, readers, turned, undone, block_rotation(size, block, signs), block)

    def _block(self, size: int) -> int:
        """The block size for this many channels."""
        if self.block is not None and size % self.block == 0 and known(self.block):
            block = self.block
        else:
            block = size if known(size) else largest_order(size)
        if block < 2:
            raise Declined(f"no Hadamard matrix fits {size} channels")
        return block

    def _said(self, size: int, block: int) -> str:
        why = ""
        if self.block is not None and block != self.block:
            why = f" (blocks of {self.block} do not fit)"
        elif self.block is None and block != size:
            why = f" (there is none of order {size})"
        return (f"hadamard {size}" if block == size else f"{size // block} blocks of hadamard {block}") + why

    # -- queries and keys ----------------------------------------------------------------------------

    def _queries_and_keys(
        self, graph: Graph, spaces: ChannelSpaces, rng: np.random.Generator, context: Context, report: PassReport
    ) -> None:
        bound = {m.value for space in spaces.of(Act.ROTATE) if space.blockers for m in space.activations}
        free = {m.value for space in spaces.admitted(Act.ROTATE) for m in space.activations} - bound
        with Rewriter(graph) as rewriter:
            for node in [n for n in graph.nodes if n.op.name == "attention"]:
                q, k = node.operands[:2]
                assert q is not None
                assert k is not None
                if any(v.producer is not None and v.producer.op.name == "hadamard" for v in (q, k)):
                    continue
                try:
                    size = q.shape[-1] if q.shape else None
                    if not isinstance(size, int):
                        raise Declined("the number of its channels is not known")
                    if q in free:
                        raise Declined(FREE)
                    block = self._block(size)
                except Declined as refusal:
                    report.decline(refusal.reason, node)
                    continue
                signs = rng.choice([-1.0, 1.0], size) if self.random else None
                for port, value in ((0, q), (1, k)):
                    options = _options(block if block != size else None, signs, value)
                    made = rewriter.insert("hadamard", [value], options, before=node, names=[f"{value.name}.hadamard"])
                    rewriter.set_operand(node, port, made.result)
                report.inserted += 2
                report.applied.append(f"{place(node)}: queries and keys, {self._said(size, block)}")


_ELEMENTWISE = ("elementwise", "arithmetic")


def _maker(value: Value) -> Node | None:
    """The node that computed what a tensor holds: the producer seen through changes of shape."""
    node = value.producer
    while node is not None and node.op.family == "structural" and (source := node.operand(0)) is not None:
        if sum(v is not None and not v.is_constant for v in node.operands) != 1:
            break
        node = source.producer
    return node


def _contracts(node: Node, value: Value) -> bool:
    """True for a linear, gemm or matmul of a constant weight with the last axis of `value`."""
    weight = node.operand(1)
    if node.op.name not in ("linear", "gemm", "matmul") or node.operands[0] is not value or not value.rank:
        return False
    return weight is not None and weight.is_constant and not node.attributes.get("trans_a", False)


def _options(block: int | None, signs: np.ndarray | None, value: Value) -> dict[str, Constant | int]:
    options: dict[str, Constant | int] = {}
    if block is not None:
        options["block"] = block
    if signs is not None:
        options["signs"] = Constant(signs, value.dtype or "f32", signs.shape)
    return options


def _fold(rewriter: Rewriter, site: _Site, spaces: ChannelSpaces) -> None:
    """Let the readers' weights take up the inverse, so that they read the transformed tensor."""
    assert site.undone.rank is not None
    found = spaces.at(site.undone, (site.undone.rank - 1,), Act.ROTATE)
    if len(found) != 1:
        raise Declined("its channels lie in several spaces")
    for blocker in found[0].blockers:
        if blocker.node is not site.undone.producer:
            raise Declined(blocker.reason, blocker.node)
    require_finite_space(found[0])
    absorb(rewriter, replace(found[0], blockers=[]), site.transform)
    rewriter.replace(site.undone, site.turned)


def _follow(context: Context, site: _Site) -> None:
    """The statistics of the transformed tensor."""
    stats, value = context.stats, site.value
    if stats is not None and value.name in stats and value.rank is not None:
        stats.channels[site.turned.name] = stats.of(value.name)
        stats.transform(site.turned.name, value.rank, (value.rank - 1,), site.transform, None, 1)
