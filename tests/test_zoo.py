"""Tiny models of the zoo through capture, raising and every exact pass, in float64 (all of them: bench/zoo.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import check_text

import planish
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import zoo_measure
import zoo_models

# a kind of block each: grouped heads and rotary pairs, 1 + w norms and soft caps, experts in one weight, a loop over
# experts, post-norm, relative positions and a tied head, windows and patch merging, a selective scan, batch norms
MODELS = ("llama", "gemma2", "qwen3-moe", "moe-loop", "bert", "t5", "swin", "mamba", "resnet")


@pytest.mark.parametrize("name", MODELS)
def test_every_exact_pass_together(name: str, seed: int) -> None:
    module, inputs = zoo_models.build(name, seed)
    reference = zoo_measure.torch_reference(module, inputs)
    graph = planish.capture(module, inputs)
    check_text(graph)
    captured, narrow = zoo_measure.evaluated(graph, inputs)
    assert narrow == 0
    assert zoo_models.largest_difference(captured, reference) <= 1e-12
    raised, _ = Pipeline("raise").run(graph, validate=False)
    check_text(raised)
    batches = [zoo_measure.graph_inputs(raised, more) for more in zoo_models.more_inputs(name, seed, 2)]
    stats = planish.collect(raised, batches)
    after, report = Pipeline(zoo_measure.pipeline()).run(raised, stats=stats, validate=False, seed=seed)
    check_text(after)
    assert sum(len(p.applied) for p in report.passes) > 3
    got, narrow = zoo_measure.evaluated(after, inputs)
    assert narrow == 0
    assert zoo_models.largest_difference(got, reference) <= zoo_measure.TOLERANCE


def test_a_wrong_weight_is_seen() -> None:
    """The comparison is not blind: one weight of many moved by a millionth."""
    module, inputs = zoo_models.build("bert")
    got, _ = zoo_measure.evaluated(planish.capture(module, inputs), inputs)
    with torch.no_grad():
        module.encoder.layer[1].output.dense.weight[3, 5] += 1e-6
    assert zoo_models.largest_difference(got, zoo_measure.torch_reference(module, inputs)) > zoo_measure.TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "resnet", "moe-loop"])
def test_models_are_planted_and_repeatable(name: str) -> None:
    module, inputs = zoo_models.build(name, 1)
    again, same = zoo_models.build(name, 1)
    other, _ = zoo_models.build(name, 2)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
        if tensor.is_floating_point() and tensor.numel() > 1 and "inv_freq" not in key and "masked_bias" not in key:
            assert float(tensor.std()) > 0.01, key  # no all-ones gain, no zero bias, no fresh statistics
            assert not torch.equal(tensor, other.state_dict()[key])
    assert all(torch.equal(v, same[k]) for k, v in inputs.items() if isinstance(v, torch.Tensor))


def test_the_zoo_is_large() -> None:
    entries = zoo_models.entries().values()
    kinds = {kind: sum(e.architecture for e in entries if e.kind == kind) for kind in {e.kind for e in entries}}
    assert sum(kinds[k] for k in ("decoder", "encoder", "encoder-decoder", "vision", "state-space")) >= 60
    assert set(kinds) >= {"diffusion", "conv", "written"}
    assert all(n >= 2 for n in kinds.values())


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, seed: int) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(zoo_models, "build", build)
    found = zoo_measure.measure("llama", [0])
    assert (found["captured"], found["failed"], found["reason"]) == (False, "build", "ValueError: no such layer")
