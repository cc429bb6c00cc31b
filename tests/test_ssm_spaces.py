"""Captured state-space models: their scans are raised, and the channel spaces of MambaQuant are found (b.md 9)."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import check_text, random_inputs, relative_error
from patterns import counts

import planish
from planish.ir.absorb import absorb
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, Space, analyse
from planish.ir.transform import random_transform
from planish.passes.manager import Pipeline
from planish.passes.validation import compare, make_probe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import ort_run

EXACT = 1e-10
RANK, STATES, INNER, WIDTH = 3, 4, 32, 16
COMMON: dict[str, Any] = {"vocab_size": 50, "hidden_size": WIDTH, "use_cache": False}
KERNELS = {"state_size": STATES, "conv_kernel": 3, "expand": 2, "num_hidden_layers": 2}


def _mamba() -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**COMMON, **KERNELS, time_step_rank=RANK))


def _falcon() -> torch.nn.Module:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    return FalconMambaForCausalLM(FalconMambaConfig(**COMMON, **KERNELS, time_step_rank=RANK))


def _jamba() -> torch.nn.Module:
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        **COMMON, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        attn_layer_period=2, attn_layer_offset=1, num_experts=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=STATES, mamba_d_conv=3, mamba_expand=2, mamba_dt_rank=RANK, pad_token_id=0,
    )  # fmt: skip
    return JambaForCausalLM(config)


def _zamba() -> torch.nn.Module:
    """Two heads: a scan for each, its rates and steps slices of one parameter."""
    from transformers import ZambaConfig, ZambaForCausalLM

    config = ZambaConfig(
        **COMMON, intermediate_size=24, num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"],
        num_attention_heads=2, num_key_value_heads=2, n_mamba_heads=2, mamba_d_state=STATES, mamba_d_conv=3,
        mamba_expand=2, mamba_dt_rank=RANK, pad_token_id=0,
    )  # fmt: skip
    return ZambaForCausalLM(config)


def _mamba2() -> torch.nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**COMMON, **KERNELS, num_heads=4, head_dim=8, n_groups=2, chunk_size=4)
    return Mamba2ForCausalLM(config)


MODELS = {"mamba": _mamba, "falcon": _falcon, "jamba": _jamba, "zamba": _zamba, "mamba2": _mamba2}
SCANS = {"mamba": 2, "falcon": 2, "jamba": 1, "zamba": 4, "mamba2": 0}


@cache
def captured(name: str) -> Graph:
    """The raised graph of a tiny random model with norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in key or key.endswith(("bias", ".D")):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        elif not key.endswith("A_log"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = torch.randint(1, 50, (2, 6), generator=generator)
    graph = planish.capture(model, {"input_ids": ids, "use_cache": False})
    check_text(graph)
    raised, report = Pipeline("raise").run(graph)
    assert report.validated
    assert len(report["raise-selective-scan"].applied) == SCANS[name]
    check_text(raised)
    return raised


@pytest.fixture(scope="module")
def mamba() -> tuple[Graph, ChannelSpaces]:
    graph = captured("mamba")
    return graph, analyse(graph)


def node_of(graph: Graph, op: str, number: int = 0) -> Node:
    return [n for n in graph.nodes if n.op.name == op][number]


def source(value: Value | None, *through: str) -> Value:
    """The value before transposes and the like."""
    while value is not None and value.producer is not None and value.producer.op.name in through:
        value = value.producer.operand(0)
    assert value is not None
    return value


def admitted(spaces: ChannelSpaces, value: Value, axis: int, act: Act) -> Space:
    (space,) = spaces.at(value, (axis,), act)
    assert space.admitted, list(map(str, space.blockers))
    return space


def names(space: Space, variance: int) -> list[str]:
    return sorted(m.value.name for m in space.constants if m.variance == variance and m.value is not None)


@pytest.mark.parametrize("name", MODELS)
def test_scans_are_raised(name: str) -> None:
    left = counts(captured(name))
    assert left.get("selective_scan", 0) == SCANS[name]
    if name in ("mamba", "falcon"):
        assert "exp" not in left and "concat" not in left, left


def test_s1_norm_to_projection(mamba: tuple[Graph, ChannelSpaces]) -> None:
    graph, spaces = mamba
    norm = node_of(graph, "rms_norm")
    space = admitted(spaces, norm.result, 2, Act.SCALE)
    assert names(space, 1) == ["backbone.layers.0.norm.weight"]
    assert names(space, -1) == ["backbone.layers.0.mixer.in_proj.weight"]


def test_s2_is_not_free(mamba: tuple[Graph, ChannelSpaces]) -> None:
    """A scale on the gate does not pass its silu: the S-SiLU of the paper leaves a multiplication at run time."""
    graph, spaces = mamba
    gate = next(n for n in graph.nodes if n.op.name == "silu" and source(n.operand(0)).producer.op.name == "split")
    (space,) = spaces.at(gate.operand(0), (1,), Act.SCALE)
    assert any("its result is not proportional to its operand" in str(b) for b in space.blockers)


def test_s4_states(mamba: tuple[Graph, ChannelSpaces]) -> None:
    """b and c are dual on the states: both come from one projection."""
    graph, spaces = mamba
    scan = node_of(graph, "selective_scan")
    b, c = scan.operand(3), scan.operand(4)
    assert b is not None and c is not None
    space = admitted(spaces, b, 1, Act.SCALE)
    assert space.size == STATES
    assert space is admitted(spaces, c, 1, Act.SCALE)
    assert names(space, 1) == names(space, -1) == ["backbone.layers.0.mixer.x_proj.weight"]


def test_s5_and_r5_low_rank_steps(mamba: tuple[Graph, ChannelSpaces]) -> None:
    """Between x_proj and dt_proj anything linear is free."""
    graph, spaces = mamba
    parts = next(n for n in graph.nodes if n.op.name == "split" and len(n.results) == 3)
    for act in (Act.SCALE, Act.PERMUTE, Act.ROTATE, Act.LINEAR):
        space = admitted(spaces, parts.results[0], 2, act)
        assert space.size == RANK
        assert space.labels is None or len(set(space.labels.tolist())) == 1
        assert names(space, 1) == ["backbone.layers.0.mixer.x_proj.weight"]
        assert names(space, -1) == ["backbone.layers.0.mixer.dt_proj.weight"]


def test_shift_of_the_low_rank_steps(mamba: tuple[Graph, ChannelSpaces]) -> None:
    """The mean goes from a bias of x_proj into that of dt_proj, though the model writes dt_proj from the left."""
    graph, spaces = mamba
    parts = next(n for n in graph.nodes if n.op.name == "split" and len(n.results) == 3)
    space = admitted(spaces, parts.results[0], 2, Act.SHIFT)
    (fold,) = space.folds
    weight = fold.node.operand(1)
    assert weight is not None and weight.name == "backbone.layers.0.mixer.dt_proj.weight"
    (made,) = space.constants
    assert made.value is None and made.node is not None
    assert made.node.operands[1].name == "backbone.layers.0.mixer.x_proj.weight"


def test_s7_depthwise_conv(mamba: tuple[Graph, ChannelSpaces]) -> None:
    """The kernel takes the scale up: the bias and everything behind it stay."""
    graph, spaces = mamba
    conv = node_of(graph, "conv")
    x, kernel, bias = conv.operands[:3]
    assert x is not None and kernel is not None and bias is not None
    space = admitted(spaces, x, 1, Act.SCALE)
    assert names(space, 1) == ["backbone.layers.0.mixer.in_proj.weight"]
    assert names(space, -1) == [kernel.name]
    assert not space.positive


def test_inner_channels_change_places(mamba: tuple[Graph, ChannelSpaces]) -> None:
    graph, spaces = mamba
    scan = node_of(graph, "selective_scan")
    space = admitted(spaces, scan.result, 1, Act.PERMUTE)
    assert space.size == INNER
    rates, skip = scan.operand(2), scan.operand(5)
    assert rates is not None and skip is not None
    assert {rates.name, skip.name} <= {m.value.name for m in space.constants if m.value is not None}


def test_r1_residual_after_folding(mamba: tuple[Graph, ChannelSpaces]) -> None:
    graph, spaces = mamba
    norm = node_of(graph, "rms_norm")
    (space,) = spaces.at(norm.result, (2,), Act.ROTATE)
    assert "fold it first" in str(space.blockers[0])
    folded, _ = Pipeline("fold-norm-gain{untie=true}").run(graph)
    norm = node_of(folded, "rms_norm")
    space = admitted(analyse(folded), norm.operands[0], 2, Act.ROTATE)
    assert space.size == WIDTH


@pytest.mark.parametrize("act", list(Act))
@pytest.mark.parametrize("name", MODELS)
def test_every_admitted_space_is_exact(name: str, act: Act) -> None:
    """A random transform of each admitted space leaves the function."""
    graph = captured(name)
    probe = make_probe(graph, 1)
    rng = np.random.default_rng(0)
    count = len(analyse(graph).admitted(act))
    assert count or act in (Act.ROTATE, Act.LINEAR, Act.SPLIT), act  # the scan blocks splits
    changed = graph.clone()
    applied = 0
    for space in analyse(changed).admitted(act):
        transform = random_transform(act, space.size, rng, labels=space.labels, positive=True)
        with Rewriter(changed) as rewriter:
            try:
                absorb(rewriter, space, transform)
                applied += 1
            except Declined as refusal:
                pytest.fail(f"{refusal}: {space.key()}")
    check_text(changed)
    assert applied == count
    verdict = compare(graph, changed, probe)
    assert verdict.error <= EXACT, verdict


@pytest.mark.parametrize("name", ["mamba", "falcon"])
def test_a_raised_scan_goes_back_to_torch_and_on_to_onnx(name: str, tmp_path: Path) -> None:
    graph = captured(name)
    inputs = random_inputs(graph, 3)
    expected = evaluate(graph, inputs, dtype=torch.float64)["logits"]
    module = planish.to_torch(graph)
    with torch.no_grad():
        got = module(**inputs, use_cache=False)["logits"]
    assert relative_error(got, expected) <= 1e-5
    planish.to_onnx(graph, tmp_path / "scan.onnx")
    model = onnx.load(tmp_path / "scan.onnx")
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node].count("Scan") == SCANS[name]
    (run,) = ort_run.run(model, [{key: value.numpy() for key, value in inputs.items()}])
    assert relative_error(torch.from_numpy(run[0]), expected) <= 1e-5
