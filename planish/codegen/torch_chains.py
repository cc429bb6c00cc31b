"""Neighbouring kernels of an emitted module as one op.

    chained(module)      in place: calls of planish_cpu:: kernels become calls of planish_cpu::chain_..

A kernel joins the chain that made one of its rows, unless something else between them has to run first: what it also
reads must not follow from the chain through other nodes. Nothing is moved past a node with effects. What a kernel
computes stays what it was; a chain of two spares one call through torch and the tensors between.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from dataclasses import dataclass, field

import torch
import torch.fx

from planish.codegen import cpp, cpp_chain
from planish.codegen.cpp import CpuKernel

__all__ = ["chained"]


@dataclass(eq=False)
class _Chain:
    """Calls of kernels, in order.

    Attributes:
        follows: the chains that it reads from, itself left out.
    """

    calls: list[torch.fx.Node] = field(default_factory=list)
    follows: set[_Chain] = field(default_factory=set)
    open: bool = True

    def reaches(self, other: _Chain) -> bool:
        """True if this chain waits for the other one, through whichever."""
        waiting, seen = [self], {self}
        while waiting:
            for chain in waiting.pop().follows:
                if chain is other:
                    return True
                if chain not in seen:
                    seen.add(chain)
                    waiting.append(chain)
        return False


def chained(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Join what can be joined.

    Args:
        module: as `torch_regions.emit` makes it for the CPU; changed in place.

    Returns:
        The module.
    """
    ends: dict[torch.fx.Node, int] = {}  # the last call of a chain -> its place
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    for chain in _chains(module.graph):
        if len(chain.calls) > 1:
            made = _joined(module.graph, chain)
            if made is not None:
                ends[made] = place[chain.calls[-1]]
    if ends:
        _sort(module.graph, {**place, **ends})
        module.graph.lint()
        module.recompile()
    return module


def _kernel_of(node: torch.fx.Node) -> CpuKernel | None:
    """The kernel that a node calls, if chains take it."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != cpp.NAMESPACE:
        return None
    found = cpp.known(target._opname)
    return found if found is not None and cpp_chain.links(found) else None


def _chains(graph: torch.fx.Graph) -> list[_Chain]:
    home: dict[torch.fx.Node, _Chain] = {}  # of calls and of the parts of their results
    behind: dict[torch.fx.Node, set[_Chain]] = {}  # the chains that a node outside of chains reads from
    found: list[_Chain] = []
    for node in graph.nodes:
        if node.is_impure() and node.op not in ("placeholder", "output"):
            for chain in found:
                chain.open = False
        kernel = _kernel_of(node)
        sources = node.all_input_nodes
        if kernel is not None:
            count = len(kernel.inputs)
            rows = [i for i, t in zip(node.args[:count], cpp._given(kernel.kernel), strict=False) if "M" in t.shape]
            makers = [home[i] for i in rows if isinstance(i, torch.fx.Node) and i in home]
            joined = [c for c in dict.fromkeys(reversed(makers)) if _joins(c, sources, home, behind)]
            chain = joined[0] if joined else _Chain()
            if not joined:
                found.append(chain)
            chain.calls.append(node)
            home[node] = chain
            chain.follows |= _before(sources, home, behind) - {chain}
        elif node.target is operator.getitem and sources[0] in home and sources[0].op == "call_function":
            if _kernel_of(sources[0]) is not None:
                home[node] = home[sources[0]]
                continue
            behind[node] = _before(sources, home, behind)
        else:
            behind[node] = _before(sources, home, behind)
    return found


def _before(
    sources: list[torch.fx.Node], home: dict[torch.fx.Node, _Chain], behind: dict[torch.fx.Node, set[_Chain]]
) -> set[_Chain]:
    found: set[_Chain] = set()
    for source in sources:
        found |= {home[source]} if source in home else behind.get(source, set())
    return found


def _joins(
    chain: _Chain,
    sources: list[torch.fx.Node],
    home: dict[torch.fx.Node, _Chain],
    behind: dict[torch.fx.Node, set[_Chain]],
) -> bool:
    """True if a call that reads these nodes can be the next of a chain."""
    if not chain.open:
        return False
    for source in sources:
        others = {home[source]} - {chain} if source in home else behind.get(source, set())
        if any(other is chain or other.reaches(chain) for other in others):
            return False
    return True


def _joined(graph: torch.fx.Graph, chain: _Chain) -> torch.fx.Node | None:
    """The call that stands for a chain; None if there is no op for it."""
    given: dict[torch.fx.Node, int] = {}
    parts: dict[torch.fx.Node, int] = {}  # what a value is: a call, or an item of its results
    calls = set(chain.calls)
    for call in chain.calls:
        for source in call.all_input_nodes:
            if source not in calls and not (source.target is operator.getitem and source.args[0] in calls):
                given.setdefault(source, len(given))
    steps: list[cpp_chain.Step] = []
    count = len(given)
    for call in chain.calls:
        kernel = _kernel_of(call)
        assert kernel is not None
        taken = tuple(parts[i] if i in parts else given[i] for i in call.args if isinstance(i, torch.fx.Node))
        outputs = [t for t in kernel.kernel.tensors if t.role == "output"]
        numbers = tuple(range(count, count + len(outputs)))
        count += len(outputs)
        if len(outputs) == 1:
            parts[call] = numbers[0]
        else:
            for user in call.users:
                parts[user] = numbers[int(user.args[1])]  # type: ignore[arg-type]
        steps.append(cpp_chain.Step(kernel, taken, numbers))
    results = [node for node in parts if any(user not in calls for user in node.users)]
    returned = list(dict.fromkeys(parts[node] for node in results))
    op = cpp_chain.chain(steps, len(given), returned) if returned else None
    if op is None:
        return None
    with graph.inserting_after(chain.calls[-1]):
        made = graph.call_function(op, tuple(given))
    made._rename(f"chain_{chain.calls[0].name}")
    for node in results:
        new = made
        if len(returned) > 1:
            with graph.inserting_after(made):
                new = graph.call_function(operator.getitem, (made, returned.index(parts[node])))
        name = node.name
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in calls)
        if new is not made:
            new._rename(f"{name}_of_chain")
    for call in reversed(chain.calls):
        for user in list(call.users):
            if user.target is operator.getitem and not user.users:
                graph.erase_node(user)
        graph.erase_node(call)
    return made


def _sort(graph: torch.fx.Graph, place: dict[torch.fx.Node, int]) -> None:
    """Put the nodes in an order in which they can run: that of `place` as far as it goes."""
    nodes = list(graph.nodes)
    at = {node: place.get(node, place.get(node.all_input_nodes[0], 0) if node.all_input_nodes else 0) for node in nodes}
    left = {node: len(node.all_input_nodes) for node in nodes}
    ready = [(at[node], i, node) for i, node in enumerate(nodes) if not left[node]]
    heapq.heapify(ready)
    index = {node: i for i, node in enumerate(nodes)}
    ordered: list[torch.fx.Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        ordered.append(node)
        for user in node.users:
            left[user] -= 1
            if not left[user]:
                heapq.heappush(ready, (at[user], index[user], user))
    for one, two in itertools.pairwise(ordered):
        one.append(two)
