"""Online Hadamard transforms: in front of down projections, behind rotary positions; and all rotations together."""

from __future__ import annotations

import sys
from pathlib import Path

import decoder_blocks
import numpy as np
import onnx
import pytest
import torch
from decoder_blocks import HIDDEN, SIZE
from encoder_blocks import WIDTH as NARROW
from encoder_blocks import pre_norm, statistics
from helpers import check_text, random_inputs, relative_error
from patterns import Build, counts, golden, reasons

from planish.codegen.onnx import to_model
from planish.ir.errors import ValidationError
from planish.ir.evaluator import Evaluator, evaluate
from planish.ir.graph import Graph
from planish.ir.hadamard import factors
from planish.passes import insert_hadamard
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from ort_run import run as run_onnx

TOLERANCE = 1e-12  # relative, in float64
EVERYTHING = (  # R1 and R2, R4, R3
    "center-layer-norm{untie=true},fold-norm-gain{untie=true},rotate-channels,"
    "insert-hadamard{sites=down},insert-hadamard{sites=qk}"
)
MODELS = {
    "decoder": lambda: decoder_blocks.decoder(),
    "tied": lambda: decoder_blocks.decoder(tied=True, offset=1.0),
    "experts": lambda: decoder_blocks.decoder(moe=True),
    "layer norms": lambda: decoder_blocks.layer_norm_decoder(tied=True),
    "vision": lambda: decoder_blocks.vision(),
}


def error(before: Graph, after: Graph) -> float:
    """The largest relative difference in float64 on inputs of two seeds."""
    worst = 0.0
    for seed in (5, 6):
        inputs = random_inputs(before, seed, {"batch": 2})
        want, got = (Evaluator(g, torch.float64).run(inputs) for g in (before, after))
        worst = max(worst, *(relative_error(got[name], want[name]) for name in want))
    return worst


def inserted(graph: Graph, pipeline: str) -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph)
    check_text(after)
    assert report.validated
    assert error(graph, after) <= TOLERANCE
    again, second = Pipeline(report.passes[-1].name + pipeline.rpartition(report.passes[-1].name)[2]).run(after)
    assert second.passes[0].applied == []
    assert again == after
    return after, report.passes[-1]


@pytest.mark.parametrize("name", MODELS)
def test_all_rotations_together(name):
    """R1, R2, R3 and R4 with grouped heads, biases and d_ff = 192 = 12 x 16 (methods/a.md, 8.1)."""
    graph = MODELS[name]()
    after, report = Pipeline(EVERYTHING).run(graph)
    check_text(after)
    assert error(graph, after) <= TOLERANCE
    roles = {line.split(": ")[1].split(",")[0] for line in report["rotate-channels"].applied}
    assert {"residual", "value"} <= roles
    assert report["insert-hadamard"].applied
    sizes = {n.result.shape[-1] for n in after.nodes if n.op.name == "hadamard"}
    assert sizes <= {HIDDEN, 24, SIZE}


def test_down():
    graph = decoder_blocks.decoder()
    after, report = inserted(graph, "insert-hadamard")
    assert report.applied == ["%mul: hadamard 192", "%mul_45: hadamard 192"]
    assert report.inserted == 2
    assert counts(after) == {**counts(graph), "hadamard": 2}
    assert factors(HIDDEN) == (12, 16)
    (first, _) = [n for n in after.nodes if n.op.name == "hadamard"]
    assert first.result.users[0].operands[1] is after.values["layers.0.down.weight"]


def test_queries_and_keys():
    graph = decoder_blocks.decoder(layers=1)
    after, report = inserted(graph, "insert-hadamard{sites=qk}")
    assert report.applied == ["attention %attention: queries and keys, hadamard 4"]
    (attention,) = [n for n in after.nodes if n.op.name == "attention"]
    made = [v.producer for v in attention.operands[:2]]
    assert [n.op.name for n in made] == ["hadamard"] * 2
    assert [n.operands[0].producer.op.name for n in made] == ["rope"] * 2
    assert attention.operands[2].producer.op.name == "transpose"


def test_all():
    graph = decoder_blocks.decoder(layers=1)
    _, report = inserted(graph, "insert-hadamard{sites=all random=true}")
    assert len(report.applied) == 6  # two norms and the last one, what o reads, what down reads, queries and keys
    folded, report = inserted(graph, "fold-norm-gain,insert-hadamard{sites=all}")
    assert [line.split(":")[0] for line in report.applied] == ["%reshape_11", "%mul", "attention %attention"]
    assert len(report.declined["rotate-channels rotates it at no cost"]) == 3
    assert counts(folded)["hadamard"] == 4


def test_random_signs_are_seeded():
    graph = decoder_blocks.decoder(layers=1)
    texts = set()
    for seed in (0, 0, 1):
        after, _ = Pipeline("insert-hadamard{random=true}").run(graph, seed=seed)
        (node,) = [n for n in after.nodes if n.op.name == "hadamard"]
        signs = node.attributes["signs"].wide()
        assert set(np.unique(signs)) == {-1.0, 1.0}
        texts.add(signs.tobytes())
    assert len(texts) == 2


def up_and_down(hidden: int, readers: int = 1, activation: str = "gelu") -> Graph:
    b = Build()
    h = b(activation, b("linear", b.input("x", "f32[b, 5]"), b.random(hidden, 5), b.random(hidden)))
    return b.output(*(b("linear", h, b.random(4, hidden), b.random(4)) for _ in range(readers)))


def test_golden(update_golden):
    b = Build()
    h = b("relu", b("linear", b.input("x", "f32[b, 2]"), b.constant(np.eye(2), name="up")))
    before = b.output(b("linear", h, b.constant([[4.0, 0], [0, 8]], name="down")))
    after, _ = inserted(before, "insert-hadamard")
    golden("insert-hadamard", before, after, update_golden)


@pytest.mark.parametrize(
    ("hidden", "options", "said"),
    [
        (92, "", "23 blocks of hadamard 4 (there is none of order 92)"),
        (96, "block=16", "6 blocks of hadamard 16"),
        (96, "block=20", "hadamard 96 (blocks of 20 do not fit)"),
        (92, "block=92", "23 blocks of hadamard 4 (blocks of 92 do not fit)"),
        (12, "", "hadamard 12"),
    ],
)
def test_sizes(hidden, options, said):
    _, report = inserted(up_and_down(hidden), f"insert-hadamard{{{options}}}")
    assert report.applied == [f"%gelu: {said}"]


def test_several_readers_share_one_op():
    after, report = inserted(up_and_down(12, readers=3), "insert-hadamard")
    assert counts(after) == {"linear": 4, "gelu": 1, "hadamard": 1}
    assert report.inserted == 1


def test_rows_of_all_tokens_in_one_axis():
    """A reshape between the activation and the weight (the form of a convolution of size 1 in some models)."""
    b = Build()
    h = b("gelu", b("linear", b.input("x", "f32[2, 3, 5]"), b.random(12, 5)))
    rows = b("reshape", h, np.array([6, 12]))
    graph = b.output(b("gemm", rows, b.random(12, 4), b.random(4)))
    _, report = inserted(graph, "insert-hadamard")
    assert report.applied == ["%reshape: hadamard 12"]


def test_positions_on_part_of_the_channels():
    """A free rotation reaches the other part only: the online one is for all of them."""
    b = Build()
    x = b.input("x", "f32[1, 1, 3, 5]")
    parts = []
    for _ in range(2):
        whole = b("linear", x, b.random(8, 5))
        turned, plain = (b("slice", whole, np.array([i]), np.array([i + 4]), np.array([-1])) for i in (0, 4))
        turned = b("rope", turned, b.random(3, 4), b.random(3, 4))
        parts.append(b("concat", turned, plain, axis=-1))
    graph = b.output(b("attention", *parts, b("linear", x, b.random(8, 5))))
    _, report = inserted(graph, "rotate-channels,insert-hadamard{sites=qk}")
    assert report.applied == ["attention %attention: queries and keys, hadamard 8"]


def test_stacked_weights_of_experts():
    b = Build()
    x = b.input("x", "f32[b, 3, 2, 5]")
    h = b("mul", b("silu", b("matmul", x, b.random(3, 5, 12))), b("matmul", x, b.random(3, 5, 12)))
    graph = b.output(b("matmul", h, b.random(3, 12, 5)))
    after, report = inserted(graph, "insert-hadamard")
    assert report.applied == ["%mul: hadamard 12"]
    assert counts(after)["hadamard"] == 1


# -- refusals ----------------------------------------------------------------------------------------


def test_no_site():
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[b, 4]"), b.random(4, 4)))
    for kind in ("down", "qk"):
        after, report = Pipeline(f"insert-hadamard{{sites={kind}}}").run(graph)
        assert after == graph
        assert report.passes[0].misses == [f"no site of kind {kind}"]


def test_what_a_free_rotation_reaches():
    b = Build()
    h = b("linear", b.input("x", "f32[b, 3]"), b.random(12, 3))
    graph = b.output(b("linear", h, b.random(2, 12)))
    after, report = Pipeline("insert-hadamard{sites=all}").run(graph)
    assert after == graph
    assert report.passes[0].declined == {"rotate-channels rotates it at no cost": ["linear %linear"]}
    plain = decoder_blocks.layer_norm_decoder(layers=1)
    _, report = Pipeline("insert-hadamard{sites=qk}").run(plain)
    assert report.passes[0].declined == {"rotate-channels rotates it at no cost": ["attention %attention"]}


def test_an_odd_number_of_channels():
    _, report = Pipeline("insert-hadamard").run(up_and_down(9))
    assert report.passes[0].declined == {"no Hadamard matrix fits 9 channels": ["gelu %gelu"]}


def test_a_weight_that_is_read_elsewhere():
    """The tied weight would have to be transformed for a reader that sees no transform: nothing is left behind."""
    b = Build()
    weight = b.random(12, 12, name="shared")
    h = b("gelu", b("linear", b.input("x", "f32[b, 12]"), weight))
    graph = b.output(b("linear", h, weight))
    after, report = Pipeline("insert-hadamard").run(graph)
    assert after == graph
    assert len(report.passes[0].declined) == 1
    assert "graph input" in reasons(report.passes[0]) or "graph output" in reasons(report.passes[0])


# -- what becomes of it ------------------------------------------------------------------------------


def test_statistics_follow():
    graph = pre_norm(activation="silu")
    _, report = Pipeline("insert-hadamard,scale-channels").run(graph, stats=statistics(graph))
    assert report["insert-hadamard"].applied == ["%silu: hadamard 12"]
    assert NARROW == 8


def test_what_meets_its_inverse_is_merged_away():
    """A model that has the transform already, undone by hand in front of a linear: both go."""
    b = Build()
    x = b("tanh", b.input("x", "f32[b, 12]"))
    twice = b("hadamard", b("hadamard", x), transpose=True)
    graph = b.output(b("linear", twice, b.random(4, 12)))
    after, report = Pipeline("merge-hadamards,insert-hadamard{sites=all}").run(graph)
    assert counts(after) == {"tanh": 1, "hadamard": 1, "linear": 1}
    assert report["insert-hadamard"].applied == ["%tanh: hadamard 12"]


def test_onnx():
    graph = decoder_blocks.decoder(layers=1)
    after, _ = Pipeline(EVERYTHING).run(graph)
    model = to_model(after, opset=17)
    onnx.checker.check_model(model)
    model.ir_version = min(model.ir_version, 10)
    ids = np.random.default_rng(0).integers(0, 40, (2, 6))
    want = next(iter(evaluate(graph, {"ids": ids}).values())).double().numpy()
    (got,) = run_onnx(model, [{"ids": ids}])[0]
    assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()


@pytest.mark.parametrize("what", ["other signs", "not normalised"])
def test_the_validator_rejects_a_wrong_fold(monkeypatch, what):
    true = insert_hadamard.block_rotation

    def wrong(n, block, signs=None, **options):
        if what == "other signs":
            return true(n, block, np.where(np.arange(n) == 3, -1.0, 1.0), **options)
        made = true(n, block, signs, **options)
        return type(made)([(i, 1.001 * np.asarray(m)) for i, m in made.blocks], n, orthogonal=True)

    monkeypatch.setattr(insert_hadamard, "block_rotation", wrong)
    with pytest.raises(ValidationError, match="pass 'insert-hadamard': changed the function"):
        Pipeline("insert-hadamard").run(decoder_blocks.decoder(layers=1))
