"""Recipes: what a file may say, and what is said about one that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from block_models import block, save
from patterns import Build

import planish
from planish.integrate.recipes import Needs, Recipe, builtin_names, load_recipe, recipe_of
from planish.integrate.yaml_file import parse_yaml
from planish.ir.errors import PlanishError

GOOD = """\
name: mine
summary: fold what is constant
pipeline: fold-constants,raise-norms
target: ort
needs:
  calibration: true
  targets: [onnx, ort]
source: nobody
"""


def message(text: str) -> str:
    with pytest.raises(PlanishError) as caught:
        recipe_of(parse_yaml(text, "r.yaml"))
    return str(caught.value)


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.target == "ort"
    assert recipe.needs.calibration is True
    assert recipe.needs.targets == ("onnx", "ort")
    assert str(recipe.passes()) == "fold-constants,raise-norms"
    assert load_recipe(recipe) is recipe


def test_what_may_be_left_out() -> None:
    recipe = recipe_of(parse_yaml("name: a\nsummary: b\npipeline: fold-constants\n"))
    assert recipe == Recipe(name="a", summary="b", pipeline="fold-constants")
    assert (recipe.target, recipe.needs.calibration, recipe.source) == ("onnx", False, "")
    assert recipe.needs.targets == ("onnx", "ort")


def test_needs_are_a_mapping() -> None:
    text = "name: a\nsummary: b\npipeline: fold-constants\nneeds: true\n"
    assert message(text) == "r.yaml:4: field 'needs': expected a mapping with calibration, targets; got True"


def test_merged_keys_may_be_given_again() -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"
    assert parse_yaml(text).data["b"] == {"x": 1, "y": 3}


def test_a_pipeline_may_span_lines() -> None:
    text = "name: a\nsummary: b\npipeline: >-\n  fold-constants,\n  raise-norms\n"
    assert str(recipe_of(parse_yaml(text)).passes()) == "fold-constants,raise-norms"


def test_every_recipe_that_comes_with_planish_loads() -> None:
    for name in builtin_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.source
        assert not recipe.summary.endswith(".")
        assert len(recipe.summary) <= 140
        assert recipe.needs.calibration or not any(p.needs_stats for p in recipe.passes().passes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("target: ort", "taget: ort"),
            "r.yaml:4: field 'taget': unknown; expected name, summary, pipeline, target, needs, source\n"
            "  hint: did you mean 'target'?",
        ),
        (("target: ort", "target: otr"), "r.yaml:4: field 'target': expected 'onnx' or 'ort'; got 'otr'\n  hint:"),
        (("name: mine\n", ""), "r.yaml:1: field 'name': is missing"),
        (
            ("name: mine", "name: My Recipe"),
            "r.yaml:1: field 'name': expected lower-case words joined by hyphens; got 'My Recipe'",
        ),
        (
            ("summary: fold what is constant", "summary: 3"),
            "r.yaml:2: field 'summary': input should be a valid string; got 3",
        ),
        (
            ("  calibration: true", "  calibration: often"),
            "r.yaml:6: field 'needs.calibration': input should be a valid boolean; got 'often'",
        ),
        (
            ("  calibration: true", "  calibrations: true"),
            "r.yaml:6: field 'needs.calibrations': unknown; expected calibration, targets\n"
            "  hint: did you mean 'calibration'?",
        ),
        (
            ("[onnx, ort]", "[onnx, otr]"),
            "r.yaml:7: field 'needs.targets.1': expected 'onnx' or 'ort'; got 'otr'\n  hint: did you mean 'ort'?",
        ),
        (("[onnx, ort]", "[]"), "r.yaml:7: field 'needs.targets': expected at least one target; got []"),
        (("[onnx, ort]", "[onnx]"), "r.yaml:4: field 'target': ort is not among needs.targets: onnx"),
        (("[onnx, ort]", "ort"), "r.yaml:7: field 'needs.targets': expected a list of onnx, ort; got 'ort'"),
        (("source: nobody", "source: a\nsource: b"), "r.yaml:9: field 'source': stands twice; first on line 8"),
        (
            ("  targets", "  calibration: true\n  targets"),
            "r.yaml:7: field 'calibration': stands twice; first on line 6",
        ),
        (
            ("raise-norms", "raise-norm"),
            "recipe 'mine': pass 'raise-norm': unknown\n"
            "  in r.yaml:3: fold-constants,raise-norm\n"
            "  hint: did you mean 'raise-norms'?",
        ),
        (("needs:", "needs: [:"), "r.yaml:5: not YAML: "),
    ],
)
def test_what_is_wrong_with_a_recipe(change: tuple[str, str], expected: str) -> None:
    assert change[0] in GOOD
    assert message(GOOD.replace(*change)).startswith(expected)


def test_a_default_target_that_cannot_is_found_without_a_target_line() -> None:
    assert message("name: a\nsummary: b\npipeline: lower\nneeds:\n  targets: [ort]\n") == (
        "r.yaml:4: field 'target': onnx is not among needs.targets: ort"
    )


def test_a_target_that_cannot_express_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(name="a", summary="b", pipeline="lower", target="ort", needs=Needs(targets=("ort",)))
    recipe.check_target("ort")
    with pytest.raises(PlanishError) as caught:
        planish.convert(save(block(), tmp_path / "m.onnx"), tmp_path / "q.onnx", recipe, target="onnx")
    assert str(caught.value) == (
        "recipe 'a': target onnx cannot express it; expected ort\n  hint: write for --target ort"
    )
    assert not (tmp_path / "q.onnx").exists()


def test_a_file_says_its_targets_in_any_order() -> None:
    assert recipe_of(parse_yaml(GOOD.replace("[onnx, ort]", "[ort, onnx, ort]"))).needs.targets == ("onnx", "ort")


def test_what_is_no_recipe(tmp_path: Path) -> None:
    assert message("- 1\n") == (
        "r.yaml:1: not a recipe; expected a mapping with name, summary, pipeline, target, needs, source"
    )
    assert message("").startswith("r.yaml:1: not a recipe")
    with pytest.raises(PlanishError, match=f"^{tmp_path}/no.yaml: cannot be read: No such file or directory$"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(PlanishError) as caught:
        load_recipe("w8a8-dynamik")
    assert caught.value.what.startswith("recipe 'w8a8-dynamik': unknown; expected a file (.yaml) or one of ")


@pytest.mark.parametrize("name", builtin_names())
def test_a_linear_without_outputs(name: str, tmp_path: Path) -> None:
    """Outputs of width 0 are no error: there is nothing to choose a transform by."""
    b = Build()
    x = b.input("x", "f32[batch, 32]")
    made = [b("linear", b(op, x), b.random(rows, 32)) for op, rows in (("neg", 16), ("relu", 0))]
    graph = b.output(*made)
    feeds = {"x": b.rng.normal(size=(4, 32)).astype(np.float32)}
    out = tmp_path / "out.onnx"
    planish.convert(graph, out, name, calibration=[feeds])
    found = planish.evaluate(planish.capture(out), feeds)
    assert [tuple(v.shape) for v in found.values()] == [(4, 16), (4, 0)]
