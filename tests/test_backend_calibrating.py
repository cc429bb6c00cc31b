"""Calibrate, then compile: statistics of a compiled model, kept, saved and read again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backend_cases as cases
import pytest
import torch
from backend_cases import EAGER, Block, Stack, close, compiled, filled, numbers, reference
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import planish
from planish.integrate.calibrating import _known, site_keys, translated
from planish.ir.errors import PlanishError

STATIC = "raise,quantize{activations=uint8:tensor:static}"
SMOOTH = "raise,scale-channels{method=smoothquant alpha=0.5},quantize{activations=int8:token}"
BATCHES = [numbers(4, 6, 32, seed=seed) * (1 + seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with cases.fresh(), torch.no_grad():
        yield


def expected_of(model: nn.Module, x: torch.Tensor, pipeline: str, batches: Any = BATCHES) -> torch.Tensor:
    """The quantised graph by planish.collect and the pipeline, uncompiled."""
    shape = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    graph = planish.capture(model, (x,), dynamic_shapes=shape)
    raised, _ = planish.Pipeline("raise").run(graph, validate=False)
    stats = planish.collect(raised, [{"x": b} for b in batches])
    after, _ = planish.Pipeline(pipeline.removeprefix("raise,")).run(raised, stats=stats, validate=False)
    found: torch.Tensor = planish.to_torch(after)(x)
    return found


def calibrated(run: Any, batches: Any = BATCHES, model: nn.Module | None = None) -> planish.Stats:
    with planish.calibrating(run) as stats:
        for b in batches:
            found = run(b)
            if model is not None:
                close(found, model(b), 0.0)  # in float
    return stats


@pytest.mark.parametrize("pipeline", [STATIC, SMOOTH])
def test_calibrate_then_compile(pipeline: str) -> None:
    model, x = filled(Stack(2), 1), numbers(4, 6, 32, seed=9)
    run = compiled(model, recipe=pipeline)
    stats = calibrated(run, model=model)
    assert stats.source["batches"] == "3" and len(stats) > 4
    close(run(x), expected_of(model, x, pipeline), 1e-5)
    assert (run(x) - model(x)).abs().max() > 0


def test_statistics_that_were_saved(tmp_path: Path) -> None:
    model, x = filled(Stack(2), 1), numbers(4, 6, 32, seed=9)
    stats = calibrated(compiled(model, recipe=STATIC))
    stats.save(tmp_path / "statistics.safetensors")
    twin, expected = copy.deepcopy(model), expected_of(model, x, STATIC)
    for given in (stats, tmp_path / "statistics.safetensors", str(tmp_path / "statistics.safetensors")):
        torch._dynamo.reset()
        close(compiled(twin, recipe=STATIC, calibration=given)(x), expected, 1e-5)


def test_a_recipe_without_calibration_waits_for_it() -> None:
    model, x = filled(Stack(1), 1), numbers(4, 6, 32, seed=9)
    run = compiled(model, recipe="w8a8-static", strict=False)
    with pytest.warns(UserWarning, match="stays in float: recipe 'w8a8-static' needs calibration; run a few batches"):
        close(run(x), model(x), 0.0)
    close(run(x), model(x), 0.0)
    calibrated(run)
    found = run(x)
    assert 0 < (found - model(x)).abs().max() < 0.2 * model(x).abs().max()
    torch._dynamo.reset()
    close(compiled(model, recipe="w8a8-static")(x), found, 1e-6)


def test_what_was_compiled_before_is_compiled_anew() -> None:
    model, x = filled(Stack(1), 1), numbers(4, 6, 32, seed=9)
    run = compiled(model, recipe=SMOOTH, strict=False)
    with cases.fresh_warnings([]):
        close(run(x), reference(model, x), 1e-6)
    calibrated(run)
    close(run(x), expected_of(model, x, SMOOTH), 1e-5)


def test_every_block_has_its_own_statistics(tmp_path: Path) -> None:
    model, x = filled(Stack(3), 1), numbers(4, 6, 32, seed=9)
    for index, block in enumerate(model.blocks):
        block.norm.weight.mul_(index + 1)
    expected = expected_of(model, x, STATIC)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = compiled(block, recipe=STATIC)
    stats = calibrated(model)
    ranges = [stats.of(f"blocks.{i}.norm:layer_norm#0.out").maximum.max() for i in range(3)]
    assert ranges[0] < ranges[1] < ranges[2]
    close(model(x), expected, 1e-5)
    stats.save(tmp_path / "statistics.safetensors")
    assert set(planish.Stats.load(tmp_path / "statistics.safetensors")) == set(stats)


def test_two_instances_have_their_own_statistics() -> None:
    first, second, x = filled(Stack(1), 1), filled(Stack(1), 2), numbers(4, 6, 32, seed=9)
    one, two = compiled(first, recipe=STATIC), compiled(second, recipe=STATIC)
    calibrated(one)
    calibrated(two, [b * 10 for b in BATCHES])
    close(one(x), expected_of(first, x, STATIC), 1e-5)
    close(two(x), expected_of(second, x, STATIC, [b * 10 for b in BATCHES]), 1e-5)


def test_the_solver_reads_the_batches() -> None:
    pipeline = "raise,quantize{weights=int4:g16 solver=gptq inputs=quantised}"
    model, x = filled(Stack(1), 1), torch.cat(BATCHES)
    run = compiled(model, recipe=pipeline)
    calibrated(run)
    assert sum(len(c.data) for c in {id(c): c for c in calibrations()}.values()) == len(BATCHES)
    found, rounded = run(x), reference(model, x, pipeline="raise,quantize{weights=int4:g16}")
    assert (found - model(x)).square().mean() < (rounded - model(x)).square().mean()


def test_the_solver_makes_do_with_statistics(tmp_path: Path) -> None:
    quantised, plain = (f"raise,quantize{{weights=int4:g16 solver=gptq inputs={i}}}" for i in ("quantised", "float"))
    model, x = filled(Stack(1), 1), torch.cat(BATCHES)
    stats = calibrated(compiled(model, recipe=plain))
    found = []
    for recipe in (quantised, plain):
        torch._dynamo.reset()
        found.append(compiled(copy.deepcopy(model), recipe=recipe, calibration=stats, strict=True)(x))
    assert torch.equal(*found)
    assert (found[0] - model(x)).abs().max() > 0


def calibrations() -> list[Any]:
    return list(_known.values())


class Masked(Block):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * mask[..., None]


def test_rows_of_padding_do_not_count() -> None:
    model = filled(Masked(), 1)
    x, mask = numbers(2, 6, 32), torch.ones(2, 6)
    x[:, 4:] *= 100
    mask[:, 4:] = 0
    run = compiled(model, recipe=STATIC)
    with planish.calibrating(run) as every:
        run(x, mask)
    with planish.calibrating(run, row_mask="mask") as counted:
        run(x, mask)
    site = "down:linear#0.0"
    assert counted.of(site).count == 8 and every.of(site).count == 12


def test_a_function_and_a_graph_break() -> None:
    first, second, x = filled(Block(), 1), filled(Block(), 2), numbers(4, 6, 32, seed=9)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    run = compiled(function, recipe=STATIC)
    calibrated(run)
    found, exact = run(x), function(x)
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_nothing_ran() -> None:
    with pytest.raises(PlanishError, match="calibration: no data; nothing that was compiled for planish ran"):  # noqa: SIM117
        with planish.calibrating(compiled(filled(Block(), 1))):
            pass


def test_an_error_inside_is_the_users() -> None:
    run, x = compiled(filled(Block(), 1)), numbers(4, 32)

    def fails() -> None:
        with planish.calibrating(run):
            run(x)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    close(run(x), reference(run._orig_mod, x), 1e-6)


def test_an_activation_that_is_not_finite() -> None:
    run = compiled(filled(Block(), 1))
    with pytest.raises(PlanishError, match=r"activation %.*: is not finite on the calibration data"):
        calibrated(run, [torch.full((4, 32), float("inf"))])


def test_statistics_of_another_model() -> None:
    stats = calibrated(compiled(filled(Stack(1), 1), recipe=STATIC))
    other = filled(nn.Sequential(nn.Linear(32, 32)), 1)
    with pytest.raises(BackendCompilerFailed, match="statistics: none of this graph's 2 sites is among their"):
        compiled(other, recipe=STATIC, calibration=stats)(numbers(4, 32))


def test_statistics_behind_other_passes() -> None:
    model, x = filled(Stack(1), 1), numbers(4, 6, 32)
    stats = calibrated(compiled(model, recipe=STATIC))
    rotated = "raise,fold-norm-gain,quantize{activations=uint8:tensor:static}"
    twin = filled(Stack(1), 2)
    with pytest.raises(BackendCompilerFailed, match=r"statistics: collected behind '.*'; the recipe reads them behind"):
        compiled(twin, recipe=rotated, calibration=stats)(x)


def test_sites_do_not_depend_on_which_sizes_are_open() -> None:
    model, x = filled(Stack(2), 1), numbers(4, 6, 32)
    auto = torch.export.Dim.AUTO
    closed = planish.capture(model, (x,))
    opened = planish.capture(model, (x,), dynamic_shapes=({0: auto, 1: auto},))
    keys = [{k for places in site_keys(g).values() for k in places} for g in (closed, opened)]
    assert keys[0] == keys[1] and len(keys[0]) == 10


def test_the_statistics_go_with_the_model() -> None:
    model, x = filled(Stack(1), 1), numbers(4, 6, 32)
    run = torch.compile(model, backend="planish", options={**EAGER, "recipe": STATIC})
    held = weakref.ref(calibrated(run))
    run(x)
    weight = weakref.ref(model.blocks[0].up.weight)
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None and held() is None


def test_a_site_of_another_width_is_left_out() -> None:
    from planish.integrate.calibrating import Calibration

    stats = calibrated(compiled(filled(Block(), 1), recipe=STATIC))
    wide = planish.capture(filled(Block(64), 1), (numbers(4, 64),))
    with pytest.raises(PlanishError, match="statistics: none of this graph's"):
        translated(Calibration(stats, ""), wide, planish.Pipeline("raise").passes)
