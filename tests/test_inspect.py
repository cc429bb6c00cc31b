"""`planish inspect`: the table of channel spaces as data and as text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from block_models import WIDTH, Builder, block, save
from helpers import check_text

from planish.capture.from_onnx import from_onnx
from planish.cli import main
from planish.ir.graph import Graph
from planish.ir.ops.base import ACTS, Act
from planish.ir.spaces import analyse
from planish.passes.manager import Pipeline
from planish.report.inspection import Inspection, inspect


def inspected(model: object) -> tuple[Graph, Inspection]:
    graph, _ = Pipeline("raise").run(from_onnx(model), validate=False)  # type: ignore[arg-type]
    check_text(graph)
    return graph, inspect(graph)


def test_a_row_combines_the_acts_of_one_set_of_tensors() -> None:
    make = Builder()
    up = make.linear("x", "up", WIDTH, 16)
    _, found = inspected(make.model(make.linear(make.node("Relu", [up], "active"), "down", 16)))
    row = next(r for r in found.rows if "active" in r.tensors and r.acts.get("scale"))
    assert row.size == 16
    assert row.structure == "16"
    assert row.acts["permute"]
    assert row.acts["scale"]
    assert row.group == "positive scale + permutation"
    assert row.writers == ("up.weight", "up.bias")
    assert row.readers == ("down.weight",)
    assert row.first == "linear /up/MatMul"
    assert row.last == "relu %active"


def test_blockers_name_the_op_the_reason_and_what_would_lift_them() -> None:
    make = Builder()
    up = make.linear("x", "up", WIDTH, 16)
    _, found = inspected(make.model(make.linear(make.node("Gelu", [up], "active"), "down", 16)))
    obstacles = [o for r in found.rows for o in r.blockers.get("scale", ()) if o.op == "gelu"]
    assert {o.where for o in obstacles} == {"gelu %active"}
    assert {o.lift for o in obstacles} == {"Mul"}
    assert {o.tensor for o in obstacles} == {"up.out", "active"}
    assert ("scale", "gelu", obstacles[0].reason, len(obstacles)) in found.obstacles
    borders = [o for r in found.rows for o in r.blockers.get("scale", ()) if o.op.startswith("graph")]
    assert {(o.op, o.lift) for o in borders} == {("graph input", "Mul"), ("graph output", "Mul")}
    assert found.lifts["scale"] == len(obstacles) + len(borders)


def test_the_sums_are_those_of_the_analysis() -> None:
    graph, found = inspected(block(2))
    spaces = analyse(graph)
    for act in ACTS:
        of_act = spaces.of(act)
        count = found.by_act[act.value]
        assert count.spaces == sum(act.value in r.acts for r in found.rows) >= len(of_act)
        assert count.admitted == sum(s.admitted for s in of_act)
        assert count.admitted == sum(act.value in r.admitted for r in found.rows)
    assert sum(found.by_group.values()) == len(found.rows)
    assert [r.id for r in found.rows] == list(range(1, len(found.rows) + 1))


def test_what_blocks_rotations_blocks_all_linear_maps() -> None:
    _, found = inspected(block(2))
    for row in found.rows:
        if row.acts.get("rotate") is False and "linear" in row.acts:
            assert row.acts["linear"] is False
            assert [o.where for o in row.blockers["linear"]] == [o.where for o in row.blockers["rotate"]]
    assert found.by_act["linear"].spaces == found.by_act["rotate"].spaces


def test_linears_are_counted_with_what_their_input_takes() -> None:
    graph, found = inspected(block(2))
    assert found.linears == sum(n.op.name == "linear" for n in graph.nodes) == 9
    # the norms can be scaled and so can what relu writes: the readers of both have a free scale
    assert found.linears_with["scale"] == 9
    assert found.linears_with["rotate"] == 0


def test_repeated_structures_are_one_row_with_a_count() -> None:
    _, found = inspected(block(4))
    grouped = found.grouped()
    assert len(grouped) < len(found.rows)
    assert sum(r.repeats for r in grouped) == len(found.rows)
    assert {r.repeats for r in grouped} >= {1, 4}
    assert len(inspect(Pipeline("raise").run(from_onnx(block(6)))[0]).grouped()) == len(grouped)


def test_opaque_nodes_are_counted() -> None:
    make = Builder()
    make.node("NonZero", ["x"], "positions")
    cast = make.node("Cast", ["positions"], "numbers", to=1)
    total = make.node("ReduceSum", [cast], "total", keepdims=0)
    _, found = inspected(make.model(make.node("Add", ["x", total], "out")))
    assert found.opaque == {"onnx::NonZero": 1}


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(block(), tmp_path / "m.onnx")
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, expected = inspected(block())
    assert len(found["rows"]) == len(expected.rows)
    assert found["rows"][0]["acts"] == expected.rows[0].acts
    assert found["linears_with"] == expected.linears_with


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(block(3), tmp_path / "m.onnx")
    assert main(["inspect", str(path)]) == 0
    short = capsys.readouterr().out
    assert re.search(r"\|\s+x3 +\|linear", short), short
    assert "linears whose input takes the transform free of cost: permute " in short
    assert re.search(r"^scale: \d+ spaces, \d+ free \(\d+ channels\)", short, re.MULTILINE)
    assert main(["inspect", str(path), "--all"]) == 0
    assert len(capsys.readouterr().out) > len(short)
    assert main(["inspect", str(path), "--act", "scale"]) == 0
    only = capsys.readouterr().out
    assert "rotate:" not in only
    assert main(["inspect", str(path), "--no-raise"]) == 0
    assert "linear " not in capsys.readouterr().out.split("graph ")[0]


def test_an_unknown_act(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(block(), tmp_path / "m.onnx")
    assert main(["inspect", str(path), "--act", "scal"]) == 2
    assert capsys.readouterr().err == (
        "error: act 'scal': unknown; expected permute, scale, shift, rotate, linear, split\n"
        "  hint: did you mean 'scale'?\n"
    )


@pytest.mark.parametrize("variable", ["NO_COLOR", ""])
def test_no_escapes_and_no_bars_in_a_pipe(tmp_path: Path, variable: str) -> None:
    path = save(block(), tmp_path / "m.onnx")
    environment = {**os.environ, **({variable: "1"} if variable else {})}
    done = subprocess.run(
        [sys.executable, "-m", "planish", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.isascii()


def test_acts_have_a_lift() -> None:
    from planish.report.inspection import LIFTS

    assert set(LIFTS) == set(Act)


def test_absorbers_are_those_of_an_act_that_is_free() -> None:
    """Behind the norm only shifts are free: what absorbs them is shown, not what would absorb a scale."""
    graph, found = inspected(block(1, readers="qkv", residual="post"))
    shifts = {s.key(): s for s in analyse(graph).of(Act.SHIFT)}
    rows = [r for r in found.rows if r.admitted == ("shift",)]
    assert rows
    for row in rows:
        space = next(s for key, s in shifts.items() if {name for name, _ in key} == set(row.tensors))
        assert row.writers == tuple(dict.fromkeys(m.value.name if m.value else "(absent)" for m in space.producers))


def test_each_act_shows_its_own_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = Builder()
    up = make.linear("x", "up", WIDTH, 16)
    model = save(make.model(make.linear(make.node("Gelu", [up], "active"), "down", 16)), tmp_path / "m.onnx")
    assert main(["inspect", str(model)]) == 0
    text = " ".join(part for line in capsys.readouterr().out.splitlines() for part in line.split("|")[-2:-1])
    text = " ".join(text.split())
    assert "scale: gelu %active: its result is not proportional to its operand" in text
    assert "shift: gelu %active: a shift of its operand does not shift its result" in text
    assert "rotate, linear: gelu %active: it bends each channel by itself" in text
