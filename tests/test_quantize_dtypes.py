"""`quantize` on models of other floats than f32: the arithmetic goes to f32, the results keep their dtype."""

from __future__ import annotations

import helpers
import pytest
import torch
from patterns import Build
from torch import nn

import planish
from planish.ir.graph import Graph

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
RECIPES = {
    "token": "quantize{activations=int8:token}",
    "static": "quantize{activations=int8:tensor:static}",
    "gptq": "quantize{weights=int4:g32 solver=gptq inputs=quantised}",
    "groups": "quantize{weights=int4:g32 activations=int4:g32 embeddings=none}",
    "split": "split-layers{clusters=2},quantize{weights=int2:g32}",
    "low-rank": "extract-low-rank{rank=4 activations=none},quantize{weights=int4:g32}",
    "outliers": "extract-outliers{count=2},quantize{activations=int8:token}",
}


class Tied(nn.Module):
    """An embedding, a feed-forward part and a head with the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 32)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))


def made(kind: str) -> tuple[Graph, Graph, list[dict[str, torch.Tensor]]]:
    """The model in a dtype, the same numbers in f32, and batches."""
    generator = torch.Generator().manual_seed(0)
    narrow = Tied().eval()
    with torch.no_grad():
        for held in narrow.parameters():
            held.copy_(torch.randn(held.shape, generator=generator) * 0.2)
    narrow = narrow.to(DTYPES[kind])
    if kind == "f64":  # numbers that f32 has
        narrow = narrow.float().double()
    ids = torch.randint(0, 300, (3, 8), generator=generator)
    own = planish.capture(narrow, (ids,))
    wide = Tied().eval()
    wide.load_state_dict(narrow.float().state_dict())
    batches = [{own.inputs[0].name: torch.randint(0, 300, (3, 8), generator=generator)} for _ in range(3)]
    return own, planish.capture(wide, (ids,)), batches


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", DTYPES)
def test_same_numbers_as_of_the_model_in_f32(kind: str, recipe: str) -> None:
    own, wide, batches = made(kind)
    found = []
    for graph in (own, wide):
        stats = planish.collect(wide, batches)  # of the same float values
        pipeline = planish.Pipeline(f"raise,{RECIPES[recipe]}")
        quantised, report = pipeline.run(graph, stats=stats, data=batches)
        assert len(report.passes[-1].applied) == len(found[0][1]) if found else report.passes[-1].applied
        helpers.check_text(quantised)
        found.append((quantised, report.passes[-1].applied))
    assert not any("expected" in reason for reason in report.passes[-1].declined)
    first, second = (planish.evaluate(q, batches[0], dtype=torch.float64) for q, _ in found)
    (a,), (b,) = first.values(), second.values()
    # a branch that stays in float has weights of the model's dtype
    bound = max(2 * torch.finfo(DTYPES[kind]).eps, 1e-7) if recipe == "low-rank" else 1e-9
    assert float((a - b).norm() / b.norm()) < bound
    assert found[0][0].output_values()[0].dtype == own.output_values()[0].dtype == kind


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_torch_module_computes_in_f32_and_keeps_the_dtype(kind: str) -> None:
    own, _, batches = made(kind)
    quantised, _ = planish.Pipeline("raise,quantize{activations=int8:token}").run(own)
    (ids,) = batches[0].values()
    got = planish.to_torch(quantised)(ids).detach()
    (exact,) = planish.evaluate(quantised, batches[0], dtype=torch.float64).values()
    (plain,) = planish.evaluate(own, batches[0], dtype=torch.float64).values()
    assert got.dtype == DTYPES[kind]
    far = float((got.double() - exact).norm() / exact.norm())
    rounding = torch.finfo(DTYPES[kind]).eps  # of the values between; a code may fall to the other side
    assert far < 8 * rounding
    assert 1e-4 < float((exact - plain).norm() / plain.norm()) < 0.05


def test_values_keep_their_names_and_the_table_stays_one() -> None:
    own, _, _ = made("bf16")
    quantised, _ = planish.Pipeline("raise,quantize").run(own)
    before = {n.result.name for n in own.nodes if n.op.name == "linear"}
    casts = {n.result.name for n in quantised.nodes if n.op.name == "cast" and n.result.dtype == "bf16"}
    assert before <= casts
    codes = [v.name for v in quantised.constants if v.dtype == "i8"]
    assert sorted(codes) == ["down.weight.codes", "table.weight.codes", "up.weight.codes"]


def test_what_stays_in_float_keeps_its_dtype() -> None:
    own, _, _ = made("f16")
    quantised, _ = planish.Pipeline("raise,quantize{only=up embeddings=none}").run(own)
    linears = {n.source: n.result.dtype for n in quantised.nodes if n.op.name == "linear"}
    assert linears == {"up": "f32", "down": "f16", "head": "f16"}
    assert sum(n.op.name == "cast" for n in quantised.nodes) == 2


def test_one_cast_for_readers_of_one_value() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    graph = planish.capture(Pair().eval().half(), (torch.zeros(2, 32, dtype=torch.float16),))
    quantised, _ = planish.Pipeline("quantize{activations=int8:token}").run(graph)
    kinds = [n.op.name for n in quantised.nodes]
    assert kinds.count("dynamic_quantize") == 1 and kinds.count("cast") == 3


def test_a_convolution_in_half() -> None:
    graph = planish.capture(nn.Conv2d(4, 8, 3).eval().half(), (torch.zeros(1, 4, 8, 8, dtype=torch.float16),))
    quantised, report = planish.Pipeline("quantize").run(graph)
    assert report.passes[-1].applied
    assert [n.result.dtype for n in quantised.nodes if n.op.name == "conv"] == ["f32"]
    assert quantised.output_values()[0].dtype == "f16"


def test_a_table_in_half_precision() -> None:
    b = Build()
    graph = b.output(b("embedding", b.random(300, 8, dtype="f16"), b.input("ids", "i64[n]")))
    quantised, report = planish.Pipeline("quantize{embeddings=int8:channel}").run(graph)
    assert report.passes[-1].applied == ["embedding %embedding.f32"]
    assert quantised.output_values()[0].dtype == "f16"
    assert [v.dtype for v in quantised.constants] == ["i8", "f32"]
