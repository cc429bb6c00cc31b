"""Neighbouring kernels as one op: the same numbers to the bit, in an order that what stands between them allows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import getitem
from typing import Any

import kernel_models
import pytest
import torch
from kernel_models import RECIPES, encoder_inputs, quantised

from planish.codegen import cpp, cpp_chain
from planish.codegen.cpp_chain import Step
from planish.codegen.regions import Plan
from planish.codegen.select import select
from planish.codegen.torch_chains import chained
from planish.codegen.torch_regions import emit, options_for

WIDTH = 128


@cache
def plan(recipe: str) -> Plan:
    """A small encoder layer by a recipe."""
    graph = kernel_models.encoder(width=WIDTH, heads=4, hidden=256)
    made = quantised(graph, recipe, [encoder_inputs(i, width=WIDTH) for i in range(2)], 64)
    return select(made, options_for("cpu"))


def inputs(batch: int, tokens: int) -> list[torch.Tensor]:
    return [torch.from_numpy(v) for v in encoder_inputs(5, batch, tokens, WIDTH).values()]


def calls(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in module.graph.nodes if str(n.target).startswith("planish_cpu.") and "attention" not in n.name]


def names(module: torch.fx.GraphModule) -> list[str]:
    return [n.target._opname.rpartition("_")[0] for n in calls(module)]  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", RECIPES)
def test_chains_compute_what_their_kernels_do(recipe: str) -> None:
    """To the bit, for every batch and length."""
    apart, module = emit(plan(recipe)), chained(emit(plan(recipe)))
    assert len(calls(apart)) >= 5 and len(calls(module)) == 2  # before attention, and behind it
    with torch.no_grad():
        for batch, tokens in ((1, 1), (2, 7), (1, 128), (3, 50)):
            given = inputs(batch, tokens)
            assert torch.equal(module(*given), apart(*given))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-rank32"])
def test_an_op_is_what_torch_takes_it_for(recipe: str) -> None:
    module = chained(emit(plan(recipe)))
    for node in calls(module):
        given = recorded(module, node, inputs(2, 7))
        torch.library.opcheck(node.target, given)  # type: ignore[arg-type]


def recorded(module: torch.fx.GraphModule, node: torch.fx.Node, given: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What a node is given in a run of its module."""
    found: list[tuple[Any, ...]] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n is node:
                found.append(self.fetch_args_kwargs_from_env(n)[0])
            return super().run_node(n)

    with torch.no_grad():
        Recorder(module).run(*given)
    return found[0]


def test_what_a_chain_is_given() -> None:
    """Rows that do not fit are refused, rows that do not lie close are copied, no rows make none."""
    module = chained(emit(plan("w8a8")))
    first, second = calls(module)
    given = recorded(module, first, inputs(2, 7))
    expected = first.target(*given)  # type: ignore[operator]
    rows = next(i for i, t in enumerate(given) if t.shape == (14, WIDTH))
    wide = torch.empty(14, 2 * WIDTH)
    wide[:, ::2] = given[rows]
    loose = [wide[:, ::2] if i == rows else t for i, t in enumerate(given)]
    for one, two in zip(listed(first.target(*loose)), listed(expected), strict=True):  # type: ignore[operator]
        assert torch.equal(one, two)
    none = [t[:0] if i == rows else t for i, t in enumerate(given)]
    assert all(t.shape[0] == 0 for t in listed(first.target(*none)))  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"expected shape \[14, 128\], got \[14, 127\]"):
        first.target(*[t[:, 1:] if i == rows else t for i, t in enumerate(given)])  # type: ignore[operator]
    given = recorded(module, second, inputs(2, 7))
    short = [i for i, t in enumerate(given) if t.shape == (14, WIDTH)]
    assert len(short) == 2  # attention's result and the residual
    with pytest.raises(RuntimeError, match=r"expected shape \[14, 128\], got \[13, 128\]"):
        second.target(*[t[1:] if i == short[1] else t for i, t in enumerate(given)])  # type: ignore[operator]


def listed(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


# -- what may join -------------------------------------------------------------------------------


def parts() -> tuple[cpp.CpuKernel, cpp.CpuKernel, list[torch.Tensor]]:
    """A kernel that quantises rows, one that multiplies them and adds rows, and the weights of the second."""
    module = emit(plan("w8a8"))
    found = {n.target._opname: n for n in calls(module)}  # type: ignore[union-attr]
    rows = next(cpp.known(name) for name in found if name.startswith("quantize_token_128"))
    first = next(n for name, n in found.items() if "_add_layer_norm" in name)
    made = cpp.known(first.target._opname)  # type: ignore[union-attr]
    assert rows is not None and made is not None
    held = [
        getattr_of(module, str(a.target)) for a in first.args if isinstance(a, torch.fx.Node) and a.op == "get_attr"
    ]
    return rows, made, held


def getattr_of(module: torch.nn.Module, path: str) -> torch.Tensor:
    owner, _, leaf = path.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return found


def twice(between: str) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    """Quantise, multiply and add, twice; the second sum takes what `between` makes of the first result."""
    rows, product, held = parts()
    graph = torch.fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")
    weights = []
    module = torch.nn.Module()
    for i, tensor in enumerate(held):
        module.register_buffer(f"weight_{i}", tensor)
        weights.append(graph.get_attr(f"weight_{i}"))
    extra, made = x, x
    for number in range(2):
        both = graph.call_function(rows.op, (made,))
        codes, scale = (graph.call_function(torch.ops.aten.view_as.default, (i, i)) if between == "views" else i
                        for i in (item(graph, both, 0), item(graph, both, 1)))  # fmt: skip
        found = graph.call_function(product.op, (codes, scale, extra, *weights))
        made = item(graph, found, 0)
        if number == 0:
            match between:
                case "nothing":
                    extra = made
                case "ATen":
                    extra = graph.call_function(torch.ops.aten.relu.default, (made,))
                case "ATen of before":
                    extra = graph.call_function(torch.ops.aten.relu.default, (x,))
                case "effect":
                    graph.call_function(torch.ops.aten.copy_.default, (state, made))
                    extra = state
    graph.output((made, state))
    return torch.fx.GraphModule(module, graph), numbers(9)


def item(graph: torch.fx.Graph, node: torch.fx.Node, index: int) -> torch.fx.Node:
    return graph.call_function(getitem, (node, index))


def numbers(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("nothing", [4]),
        ("ATen of before", [4]),
        ("ATen", [3, 1]),  # the second sum waits for the first chain and for what stands between
        ("effect", [2, 2]),  # nothing is moved past a write
        ("views", [1, 2, 1]),  # what a kernel reads is not what the other one made
    ],
)
def test_what_stands_between(between: str, expected: list[int]) -> None:
    apart, x = twice(between)
    module, _ = twice(between)
    chained(module)
    sizes = [int(n.target._opname.split("_")[2]) if "chain" in n.name else 1 for n in calls(module)]  # type: ignore[union-attr]
    assert sizes == expected
    with torch.no_grad():
        for one, two in zip(apart(x, torch.ones(9, WIDTH)), module(x, torch.ones(9, WIDTH)), strict=True):
            assert torch.equal(one, two)


def test_two_chains_do_not_wait_for_each_other() -> None:
    """a1 -> b2 <- b1 and b1 -> a2 <- a1: joined as {a1, a2} and {b1, b2} neither could begin."""
    rows, product, held = parts()
    graph, module = torch.fx.Graph(), torch.nn.Module()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for i, tensor in enumerate(held):
        module.register_buffer(f"weight_{i}", tensor)
    weights = [graph.get_attr(f"weight_{i}") for i in range(len(held))]

    def sums(codes_of: torch.fx.Node, extra: torch.fx.Node) -> torch.fx.Node:
        both = graph.call_function(rows.op, (codes_of,))
        found = graph.call_function(product.op, (item(graph, both, 0), item(graph, both, 1), extra, *weights))
        return item(graph, found, 0)

    relu = torch.ops.aten.relu.default
    one, two = sums(x, x), sums(y, y)
    left = sums(one, graph.call_function(relu, (two,)))
    right = sums(two, graph.call_function(relu, (one,)))
    graph.output((left, right))
    apart = torch.fx.GraphModule(module, graph)
    joined = chained(torch.fx.GraphModule(module, _copy(graph)))
    assert sum(1 for n in calls(joined)) >= 3
    with torch.no_grad():
        given = numbers(5), numbers(5, 1)
        for mine, theirs in zip(joined(*given), apart(*given), strict=True):
            assert torch.equal(mine, theirs)


def _copy(graph: torch.fx.Graph) -> torch.fx.Graph:
    made = torch.fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def test_without_native_ops_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_chain, "native", lambda: None)
    monkeypatch.setattr(cpp_chain, "_known", {})
    module = chained(emit(plan("w8a8")))
    assert not any("chain" in n.name for n in calls(module))
    with torch.no_grad():
        assert torch.equal(module(*inputs(2, 7)), emit(plan("w8a8"))(*inputs(2, 7)))


# -- memory --------------------------------------------------------------------------------------


def steps_of(recipe: str) -> list[Step]:
    """The steps of the longer chain of a layer."""
    seen: list[list[Step]] = []
    original = cpp_chain.chain

    def spy(steps: Sequence[Step], given: int, made: Sequence[int]) -> Any:
        seen.append(list(steps))
        return original(steps, given, made)

    cpp_chain.chain = spy
    try:
        chained(emit(plan(recipe)))
    finally:
        cpp_chain.chain = original
    return max(seen, key=len)


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_that_are_needed_at_once_lie_apart(recipe: str) -> None:
    steps = steps_of(recipe)
    within = [v for step in steps[:-1] for v in step.made]
    sizes, place = cpp_chain.pieces(steps, within)
    assert set(place) == set(within)
    for index, step in enumerate(steps):
        live = {v for v in within if any(v in s.made for s in steps[: index + 1])}
        live &= {v for s in steps[index:] for v in (*s.given, *s.made)}
        assert len({place[v] for v in live}) == len(live), step.kernel.name
    slots = cpp_chain._slots_of(steps)
    for value in within:
        row, least = cpp_chain._bytes(slots[value])
        assert sizes[place[value]][0] >= row and sizes[place[value]][1] >= least
    if recipe == "w8a8":
        assert len(sizes) < len(within)


def test_pieces_that_are_shared_too_early_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded fault: all values within a chain in one piece."""

    def wrong(steps: Sequence[Step], within: Sequence[int]) -> tuple[list[tuple[int, int]], dict[int, int]]:
        return [(1 << 14, 1 << 14)], dict.fromkeys(within, 0)

    monkeypatch.setattr(cpp_chain, "pieces", wrong)
    monkeypatch.setattr(cpp_chain, "_known", {})
    monkeypatch.setattr(cpp_chain, "PREFIX", "wrong_chain_of")
    module = chained(emit(plan("w8a8")))
    with torch.no_grad():
        assert not torch.equal(module(*inputs(2, 7)), emit(plan("w8a8"))(*inputs(2, 7)))
