"""The op table, audited: every claim of every row on numbers, and every refusal too (`planish.ir.audit`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import check_text

from planish.ir import audit_instances, ops
from planish.ir.audit import audit
from planish.ir.audit_trial import Instance, Trial
from planish.ir.graph import Node
from planish.ir.ops.base import INVISIBLE, Act, Axes, Block, Carry, Fold, Link, OpDef, Port, Relation
from planish.ir.types import TensorType
from planish.report.op_table import render

NAMES = sorted(ops.table())


def instances(name: str) -> list[Instance]:
    return audit_instances.instances().get(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_row(name: str) -> None:
    findings = audit(ops.get(name), instances(name), seed=7)
    assert not findings, "\n".join(map(str, findings[:20]))


def test_no_instances_for_ops_that_are_not_there() -> None:
    assert sorted(audit_instances.instances()) == NAMES


def test_a_row_without_instances_is_a_hole_in_the_grid() -> None:
    (finding,) = audit(ops.get("gelu"), [], seed=0)
    assert finding.what == "no instance in the audit: a hole in the grid"


def test_an_operand_that_no_instance_has_is_a_hole_in_the_grid() -> None:
    bare = [i for i in instances("linear") if len(i.operands) == 2]
    assert [f.what for f in audit(ops.get("linear"), bare, seed=0)] == ["no instance has operand bias"]


@pytest.mark.parametrize("name", NAMES)
def test_instances_print_and_have_their_channels(name: str) -> None:
    """The text round trip; and the search for spaces starts at ascending axes of ports that are there."""
    row, rng = ops.get(name), np.random.default_rng(0)
    for instance in instances(name):
        trial = Trial(row, instance, rng)
        for index, result in enumerate(trial.node.results):
            trial.graph.add_output(f"result{index}", result)
        check_text(trial.graph)
        for port, axes in row.channels(trial.node):
            value = trial.node.port(port)
            assert value is not None
            assert value.rank is not None
            assert all(0 <= a < value.rank for a in axes)
            assert list(axes) == sorted(set(axes))


# -- the audit has teeth -----------------------------------------------------------------------------

Relate = Callable[[Node, Act, Port, Axes], Relation]


def seeded(name: str, change: Callable[[Relate], Relate]) -> list[str]:
    """The findings for a row whose `relate` was changed."""
    row: OpDef = ops.get(name)
    return [str(f) for f in audit(replace(row, relate=change(row.relate)), instances(name), seed=3)]


def _on_carry(edit: Callable[[Node, Act, Port, Carry], Relation]) -> Callable[[Relate], Relate]:
    def change(relate: Relate) -> Relate:
        def changed(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
            relation = relate(node, act, port, axes)
            return edit(node, act, port, relation) if isinstance(relation, Carry) else relation

        return changed

    return change


def _through(act: Act) -> Callable[[Relate], Relate]:
    def change(relate: Relate) -> Relate:
        def changed(node: Node, asked: Act, port: Port, axes: Axes) -> Relation:
            return Carry((Link(~port, axes),)) if asked is act else relate(node, asked, port, axes)

        return changed

    return change


def _without(*ports: Port) -> Callable[[Relate], Relate]:
    return _on_carry(
        lambda node, act, port, carry: replace(carry, links=tuple(k for k in carry.links if k.port not in ports))
    )


def _upright(node: Node, act: Act, port: Port, carry: Carry) -> Relation:
    return replace(carry, links=tuple(replace(k, variance=1) for k in carry.links))


def _unpaired(node: Node, act: Act, port: Port, carry: Carry) -> Relation:
    return replace(carry, links=tuple(k for k in carry.links if k.port != port))


def _unwalled(node: Node, act: Act, port: Port, carry: Carry) -> Relation:
    return replace(carry, block_axes=())


def _signed(node: Node, act: Act, port: Port, carry: Carry) -> Relation:
    return replace(carry, positive=False)


def _no_offset(node: Node, act: Act, port: Port, carry: Carry) -> Relation:
    return replace(carry, links=tuple(replace(k, offset=0.0) for k in carry.links))


WRONG: list[Any] = [
    ("gelu", _through(Act.SCALE), "scale at port 0"),
    ("relu", _through(Act.ROTATE), "rotate at port 0"),
    ("relu", _on_carry(_signed), "scale at port 0"),
    ("tanh", _through(Act.SHIFT), "shift at port 0"),
    ("softmax", _through(Act.SCALE), "scale at port 0"),
    ("layer_norm", _through(Act.ROTATE), "rotate at port 0"),
    ("rms_norm", _through(Act.ROTATE), "rotate at port 0"),
    ("rms_norm", _on_carry(_no_offset), "scale at port -1"),
    ("linear", _without(2), "at port -1"),
    ("linear", _on_carry(_upright), "scale at port 0"),
    ("matmul", _on_carry(_upright), "scale at port 0"),
    ("matmul", _on_carry(_unwalled), "rotate at port"),
    ("conv", _without(2), "at port -1"),
    ("attention", _on_carry(_upright), "scale at port 0"),
    ("attention", _on_carry(_unwalled), "rotate at port"),
    ("rope", _on_carry(_unpaired), "scale at port 0"),
    ("batch_norm", _without(3), "at port 0"),
]


@pytest.mark.parametrize(("name", "change", "found"), WRONG)
def test_a_wrong_row_is_rejected(name: str, change: Callable[[Relate], Relate], found: str) -> None:
    findings = seeded(name, change)
    assert any("does not hold" in f and found in f for f in findings), findings[:5]


def test_a_wrong_fold_is_rejected() -> None:
    row = ops.get("linear")
    assert row.fold is not None
    fold = row.fold
    wrong = replace(row, fold=lambda *question: {k: -v for k, v in fold(*question).items()})
    assert any("does not fold" in str(f) for f in audit(wrong, instances("linear"), seed=3))


def test_a_fold_by_a_factor_of_1_000001_is_rejected() -> None:
    row = ops.get("conv")
    assert row.fold is not None
    fold = row.fold
    wrong = replace(row, fold=lambda *question: {k: v * 1.000001 for k, v in fold(*question).items()})
    assert any("does not fold" in str(f) for f in audit(wrong, instances("conv"), seed=3))


@pytest.mark.parametrize(("name", "act"), [("linear", Act.SCALE), ("relu", Act.PERMUTE), ("add", Act.PERMUTE)])
def test_an_overlooked_identity_must_be_declared(name: str, act: Act) -> None:
    def change(relate: Relate) -> Relate:
        def changed(node: Node, asked: Act, port: Port, axes: Axes) -> Relation:
            return Block("no rule") if asked is act else relate(node, asked, port, axes)

        return changed

    assert any("is refused (no rule), but goes with" in f for f in seeded(name, change))
    row = ops.get(name)
    declared = replace(row, relate=change(row.relate), conservative={**row.conservative, act.value: "a test"})
    assert not audit(declared, instances(name), seed=3)


def test_a_wrong_type_is_found() -> None:
    row = ops.get("softmax")
    wrong = replace(row, infer=lambda node: [TensorType("f32", (1,))])
    findings = audit(wrong, instances("softmax"), seed=0)
    assert findings
    assert all("is inferred as" in f.what for f in findings)


# -- rows that are written down in the design, one by one --------------------------------------------


def relation(name: str, number: int, act: Act, port: Port, axes: Axes) -> Relation:
    trial = Trial(ops.get(name), instances(name)[number], np.random.default_rng(0))
    return trial.node.op.relate(trial.node, act, port, axes)


def test_linear_takes_everything_up() -> None:
    for act in (Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR):
        assert relation("linear", 1, act, 0, (1,)) == Carry((Link(1, (1,), -1),))
        assert relation("linear", 1, act, -1, (1,)) == Carry((Link(1, (0,)),))
        assert relation("linear", 0, act, -1, (1,)) == Carry((Link(1, (0,)), Link(2, (0,))))
    assert relation("linear", 1, Act.SHIFT, 0, (1,)) == Fold((2,))
    assert relation("linear", 1, Act.SHIFT, -1, (1,)) == Carry((Link(2, (0,), grow=(3,), neutral=0.0),))


def test_shift_of_values_passes_a_softmax_only() -> None:
    assert isinstance(relation("matmul", 3, Act.SHIFT, 1, (0, 2)), Block)
    assert relation("matmul", 15, Act.SHIFT, 1, (0, 2)) == Carry((Link(-1, (0, 2)),))
    assert relation("attention", 0, Act.SHIFT, 2, (1, 3)) == Carry((Link(-1, (1, 3)),))


def test_a_shift_of_the_keys_is_invisible_to_a_softmax() -> None:
    assert relation("attention", 0, Act.SHIFT, 1, (1, 3)) == INVISIBLE
    assert isinstance(relation("attention", 0, Act.SHIFT, 0, (1, 3)), Block)


def test_a_cap_and_sinks_see_what_a_softmax_alone_does_not() -> None:
    capped = next(i for i, x in enumerate(instances("attention")) if x.attributes.get("softcap"))
    sunk = next(i for i, x in enumerate(instances("attention")) if len(x.operands) == 5)
    for number in (capped, sunk):
        assert relation("attention", number, Act.LINEAR, 0, (1, 3)) == relation("attention", 0, Act.LINEAR, 0, (1, 3))
        assert relation("attention", number, Act.SHIFT, 1, (1, 3)) == Block("a shift changes the scores")
    assert relation("attention", capped, Act.SHIFT, 2, (1, 3)) == Carry((Link(-1, (1, 3)),))
    assert relation("attention", sunk, Act.SHIFT, 2, (1, 3)) == Block("with sinks, its rows do not sum to one")
    answer = relation("attention", sunk, Act.PERMUTE, 4, (0,))
    assert isinstance(answer, Carry)
    assert sorted(link.port for link in answer.links) == [-1, 0, 1, 2]


def test_query_heads_share_the_transform_of_their_key_head() -> None:
    answer = relation("attention", 1, Act.LINEAR, 0, (1, 3))
    assert isinstance(answer, Carry)
    assert answer.block_axes == (1,)
    (link,) = answer.links
    assert (link.port, link.axes, link.variance) == (1, (1, 3), -1)
    assert link.pairs is not None
    asker, keys = link.pairs
    assert (keys // 4 == asker // 4 // 2).all()
    assert (keys % 4 == asker % 4).all()


def test_a_depthwise_kernel_takes_the_scale_of_either_side() -> None:
    before, after = relation("conv", 8, Act.SCALE, 0, (1,)), relation("conv", 8, Act.SCALE, -1, (1,))
    assert isinstance(before, Carry)
    assert isinstance(after, Carry)
    assert [(k.port, k.variance, k.apart) for k in before.links] == [(1, -1, True)]
    assert [(k.port, k.variance, k.apart) for k in after.links] == [(1, 1, False), (2, 1, False)]


def test_padding_keeps_a_shift_out() -> None:
    assert relation("conv", 0, Act.SHIFT, 0, (1,)) == Fold((2,))
    assert relation("conv", 1, Act.SHIFT, 0, (1,)) == Block("a shift does not reach the zeros of its padding")


def test_rotation_needs_an_equal_gain() -> None:
    blocked = relation("rms_norm", 1, Act.ROTATE, 0, (2,))
    assert blocked == Block("its gain differs between channels: fold it first")
    assert relation("rms_norm", 2, Act.ROTATE, 0, (2,)) == Carry((Link(-1, (2,)),))
    assert isinstance(relation("layer_norm", 2, Act.ROTATE, 0, (2,)), Block)


def test_a_gain_that_counts_from_an_offset_takes_a_scale_up() -> None:
    offset = next(i for i, x in enumerate(instances("rms_norm")) if x.attributes.get("gain_offset"))
    answer = relation("rms_norm", offset, Act.SCALE, -1, (2,))
    assert answer == Carry((Link(1, (0,), offset=1.0),))


# -- docs/ir.md --------------------------------------------------------------------------------------


def test_the_page_says_what_the_rows_say() -> None:
    page = Path(__file__).parent.parent / "docs" / "ir.md"
    assert page.read_text() == render(), "run `python -m planish.report.op_table > docs/ir.md`"


def test_the_page_has_every_op() -> None:
    text = render()
    assert not [name for name in NAMES if f"| {name} |" not in text]
    assert text.isascii()
