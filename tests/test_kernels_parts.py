"""A gemm with closing steps and its two parts, which are launched on many rows, compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_models
import kernel_oracle
import numpy as np
import pytest
import torch

from planish.codegen import triton
from planish.codegen.gemm_parts import MOST_ROWS, launched, parts
from planish.codegen.kernel_spec import Kernel
from planish.codegen.regions import Region
from planish.codegen.select import Options, select
from planish.codegen.triton_run import Runner

RECIPES = ("w8a8", "w4a4-rank32", "llm-int8")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this file's own."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path_factory.getbasetemp() / "kernels-parts"))


def closing(recipe: str, model: str = "encoder") -> Kernel:
    """The kernel with closing steps of a model."""
    found = {r.kernel for r in kernel_models.plan_of(model, recipe).kernels if r.kernel and r.kernel.closing}
    (kernel,) = found
    assert kernel is not None
    return kernel


def named(kernel: Kernel, made: Any) -> dict[str, torch.Tensor]:
    names = [t.name for t in kernel.tensors if t.role == "output"]
    return dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))


def in_turn(kernel: Kernel, given: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """The results of the parts of a kernel."""
    held = dict(given)
    for part in parts(kernel):
        module = triton.load(triton.emit_kernel(part, dtype))
        read = {t.name: held[t.name] for t in part.tensors if t.role in ("input", "weight")}
        held |= named(part, module.run(**read))
    return {t.name: held[t.name] for t in kernel.tensors if t.role == "output"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_parts_make_what_the_whole_makes(recipe: str) -> None:
    kernel = closing(recipe)
    given = triton.load(triton.emit_kernel(kernel, "f16")).example(33, 1, "cpu")
    expected = kernel_oracle.judged(kernel, given, "f16")
    assert kernel_oracle.problems(kernel, expected, in_turn(kernel, given, "f16"), "f16") == []


def test_a_part_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = closing("w8a8")
    given = triton.load(triton.emit_kernel(kernel, "f16")).example(33, 1, "cpu")
    expected = kernel_oracle.judged(kernel, given, "f16")
    made = in_turn(kernel, given, "f16")
    for name, held in made.items():
        wrong = made | {name: torch.roll(held, 1, 0)}
        assert kernel_oracle.problems(kernel, expected, wrong, "f16")


@pytest.mark.parametrize("model", ["encoder", "decoder"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_border_of_the_parts(model: str, recipe: str) -> None:
    kernel = closing(recipe, model)
    tiles, rows = parts(kernel)
    assert (tiles.kind, tiles.closing, tiles.steps) == ("gemm", (), kernel.steps)
    assert (rows.kind, rows.steps, rows.columns, rows.outputs) == ("prologue", kernel.closing, kernel.outputs, 0)
    role = {t.name: t.role for t in kernel.tensors}
    first, second = ({t.name: t.role for t in part.tensors} for part in (tiles, rows))
    assert {*first, *second} == {*role}
    between = {*first} & {*second}
    assert between and all(first[name] == "output" and second[name] == "input" for name in between)
    assert rows.row in between
    for held in (first, second):
        assert all(held[name] == role[name] for name in held if name not in between)
        assert "scratch" not in held.values()
    assert all(role[name] in ("scratch", "output") for name in between)


def test_which_kernels_are_launched() -> None:
    kernel = closing("w8a8")
    assert launched(kernel, MOST_ROWS) == (kernel,)
    assert launched(kernel, MOST_ROWS + 1) == parts(kernel)
    tiles, rows = parts(kernel)
    assert launched(tiles, 512) == (tiles,) and launched(rows, 512) == (rows,)
    with pytest.raises(ValueError, match="expected one with closing steps"):
        parts(tiles)


def test_the_tiles_are_those_of_a_plan_without_closing_steps() -> None:
    """Apart from what the rows are called, which the plan takes from the graph."""
    graph = kernel_models.graph_of("encoder", "w8a8")
    apart = [r.kernel for r in select(graph, Options(closing=False)).kernels]

    def shape(kernel: Kernel) -> Any:
        border = [(t.role, t.dtype, t.shape, t.packed) for t in kernel.tensors]
        return kernel.kind, kernel.columns, kernel.outputs, border, [s.row for s in kernel.steps]

    known = [shape(kernel) for kernel in apart if kernel is not None]
    assert all(shape(part) in known for part in parts(closing("w8a8")))


def test_a_plan_runs_its_parts_on_many_rows() -> None:
    plan = kernel_models.plan_of("encoder", "w8a8")
    runner = Runner(plan, "f32")
    held: list[Region] = [r for r in plan.kernels if r.kernel is not None and r.kernel.closing]
    outputs = {}
    for tokens, more in ((8, 0), (20, len(held))):
        inputs = kernel_models.encoder_inputs(0, 1, tokens)
        found = runner.run(inputs)
        assert runner.launched == len(plan.kernels) + more
        outputs[tokens] = found[plan.graph.outputs[0][0]]
        assert not np.isnan(outputs[tokens].numpy()).any()


def test_the_files_of_the_parts(tmp_path: Path) -> None:
    plan = kernel_models.plan_of("encoder", "w8a8")
    files = {e.name for e in triton.emit_plan(plan, tmp_path)}
    names = [triton.emit_kernel(part).name for part in parts(closing("w8a8"))]
    assert {*names} < files
    assert f"; on more than 16 rows {names[0]}.py and {names[1]}.py" in (tmp_path / "plan.txt").read_text()
