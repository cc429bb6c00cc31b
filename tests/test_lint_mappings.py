"""The mappings in examples/lint on captured models: what a tool registers, and what would be right."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import check_text

import planish
from planish.ir.graph import Graph
from planish.passes.manager import Pipeline
from planish.report.mapping import Lint, lint

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import zoo_models

ROOT = Path(__file__).parents[1]


@cache
def raised(model: str) -> Graph:
    module, inputs = zoo_models.build(model)
    graph, _ = Pipeline("raise").run(planish.capture(module, inputs), validate=False)
    check_text(graph)
    return graph


def judged(model: str, mapping: str, seed: int) -> Lint:
    found = lint(raised(model), ROOT / "examples" / "lint" / f"{mapping}.yaml", seed=seed)
    assert found.unchecked == ""
    for verdict in found.verdicts:
        assert verdict.agree, verdict  # the numbers say the same as the analysis
    return found


@pytest.mark.parametrize(
    ("model", "mapping"),
    [("gemma2", "gemma_right"), ("gemma3", "gemma_right"), ("phi", "phi_right"), ("moe-loop", "moe_right")],
)
def test_the_right_mappings_are_identities(model: str, mapping: str, seed: int) -> None:
    found = judged(model, mapping, seed)
    assert found.identity
    assert len(found.verdicts) == (2 if model == "phi" else 4)
    assert found.passed_over == ()
    assert all(v.error is not None and v.error < 1e-12 and not v.reasons for v in found.verdicts)


@pytest.mark.parametrize("model", ["gemma2", "gemma3"])
def test_a_norm_behind_attention_is_not_what_the_mlp_reads(model: str, seed: int) -> None:
    found = judged(model, "gemma_registered", seed)
    assert not found.identity
    good, bad = found.verdicts[:2], found.verdicts[2:]
    assert all(v.identity and v.smooth.endswith("input_layernorm") for v in good)
    for layer, verdict in enumerate(bad):
        at = f"model.layers.{layer}"
        assert not verdict.identity
        assert verdict.smooth == f"{at}.post_attention_layernorm"
        assert (
            f"{at}.mlp.gate_proj, {at}.mlp.up_proj read what {at}.pre_feedforward_layernorm writes, "
            f"not what {at}.post_attention_layernorm writes"
        ) in verdict.reasons
        assert f"{at}.post_feedforward_layernorm writes it too, and the mapping leaves it out" in verdict.reasons


def test_a_parallel_block_has_another_reader(seed: int) -> None:
    found = judged("phi", "phi_registered", seed)
    assert not found.identity
    for layer, verdict in enumerate(found.verdicts):
        assert verdict.reasons == (f"model.layers.{layer}.mlp.fc1 reads it too, and the mapping leaves it out",)
    (passed_over,) = found.passed_over  # there is no gate_proj, up_proj and post_attention_layernorm
    assert passed_over.endswith("phi_registered.yaml:8")


def test_a_router_reads_the_norm_too(seed: int) -> None:
    found = judged("moe-loop", "moe_registered", seed)
    assert [v.identity for v in found.verdicts] == [True, True, False, False]
    for layer, verdict in enumerate(found.verdicts[2:]):
        assert verdict.reasons == (f"layers.{layer}.mlp.gate reads it too, and the mapping leaves it out",)


def test_a_router_beside_experts_in_one_weight(seed: int) -> None:
    found = judged("glm4-moe", "moe_registered", seed)
    by_name = {v.smooth: v for v in found.verdicts}
    assert by_name["model.layers.0.post_attention_layernorm"].identity  # a dense layer
    verdict = by_name["model.layers.1.post_attention_layernorm"]
    assert not verdict.identity
    assert "model.layers.1.mlp.gate reads it too, and the mapping leaves it out" in verdict.reasons
    assert any("model.layers.1.mlp.experts reads it too" in reason for reason in verdict.reasons)
