"""planish.optimize: a torch module in, a quantised torch module out, and what can be done with it."""

from __future__ import annotations

import copy
import os
import pickle  # noqa: TID251 - users may pickle a module; planish itself loads none
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import planish
from planish.integrate.convert import CalibrationOptions
from planish.integrate.optimize import calibration_of
from planish.integrate.optimized import OptimizedModule
from planish.ir.errors import PlanishError

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import zoo_models

HERE = Path(__file__).parent
KERNELS = 7  # two norms; q, k and v; the codes that o reads; o; gate and up with the next codes; down
ON_CPU = 6  # o with the norm behind it
LOSS = 0.05  # relative error of a tiny random model that int8 rounding stays below


class Block(nn.Module):
    """Tokens in; attention over them, a gated MLP, a head. Outputs in a dict."""

    def __init__(self, width: int = 64, heads: int = 4, tokens: int = 100) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(tokens, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        if scale is not None:
            x = x * scale
        h = self.before(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.between(x)
        return {"y": x + self.down(F.silu(self.gate(h)) * self.up(h)), "h": h}


def model(seed: int = 0, **options: int) -> Block:
    made, generator = Block(**options).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, held in made.named_parameters():  # no gain of ones
            if name.startswith("be") and name.endswith("weight"):
                held.uniform_(0.5, 2.0, generator=generator)
            else:
                held.normal_(0.0, 1.0 if held.ndim == 1 else held.shape[1] ** -0.5, generator=generator)
    return made


def tokens(batch: int = 2, length: int = 7, seed: int = 0, most: int = 100) -> torch.Tensor:
    return torch.randint(0, most, (batch, length), generator=torch.Generator().manual_seed(seed))


def kernels(module: torch.fx.GraphModule, space: str = "planish_cpu") -> int:
    """The kernels of regions, those of a chain each; attention, on the CPU a kernel as well, is not counted."""
    names = [str(n.target) for n in module.graph.nodes]
    own = [n for n in names if n.startswith(f"{space}.") and not n.startswith("planish_cpu.attention")]
    return sum(int(chain[1]) if (chain := re.search(r"\.chain_of_(\d+)_", name)) else 1 for name in own)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def block() -> Block:
    return model()


@pytest.fixture(scope="module")
def optimised(block: Block) -> OptimizedModule:
    return planish.optimize(block, tokens())


# -- the call ------------------------------------------------------------------------------------


def test_it_computes_nearly_what_the_model_does(block: Block, optimised: OptimizedModule) -> None:
    """One module for every batch and length; outputs in the model's own structure."""
    assert isinstance(optimised, nn.Module) and not optimised.training
    assert kernels(optimised) == ON_CPU
    with torch.no_grad():
        for batch, length in ((2, 7), (1, 1), (7, 3), (1, 128)):
            ids = tokens(batch, length, seed=batch)
            got, expected = optimised(ids), block(ids)
            assert list(got) == ["y", "h"]
            for name, value in expected.items():
                assert got[name].shape == value.shape and got[name].dtype == value.dtype
                assert distance(got[name], value) <= LOSS
    assert optimised.planish.recipe == "w8a8-token"
    (note,) = optimised.planish.notes
    assert note.startswith("without calibration did not run as written: shift-channels")


def test_keywords_and_floats(block: Block) -> None:
    scale = torch.tensor(2.0)
    module = planish.optimize(block, {"ids": tokens(), "scale": scale})
    with torch.no_grad():
        expected = block(tokens(), scale=scale)["y"]
        assert distance(module(scale=scale, ids=tokens())["y"], expected) <= LOSS
        assert distance(module(tokens(), scale)["y"], expected) <= LOSS


def test_it_shares_nothing_with_the_model() -> None:
    block = model(3)
    module = planish.optimize(block, tokens(), recipe="raise,quantize{embeddings=none activations=int8:token}")
    before = module(tokens())["y"]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(module(tokens())["y"], before)
    assert torch.equal(module.bfloat16().float()(tokens())["y"].isfinite(), torch.ones_like(before, dtype=torch.bool))
    assert distance(module(tokens())["y"], before) <= LOSS


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_models_of_narrow_floats(dtype: torch.dtype) -> None:
    block = model().to(dtype)
    module = planish.optimize(block, tokens())
    assert kernels(module) == ON_CPU
    with torch.no_grad():
        got, expected = module(tokens())["y"], block.float()(tokens())["y"]
    assert got.dtype == dtype
    assert distance(got, expected) <= LOSS


@pytest.mark.parametrize("shape", [pytest.param((1, 7), marks=pytest.mark.slow), (1, 1)])
def test_examples_of_one_leave_sizes_open(block: Block, shape: tuple[int, int]) -> None:
    module = planish.optimize(block, tokens(*shape))
    with torch.no_grad():
        assert distance(module(tokens(3, 5))["y"], block(tokens(3, 5))["y"]) <= LOSS


def test_given_shapes(block: Block) -> None:
    module = planish.optimize(block, tokens(), dynamic_shapes=None)
    assert module(tokens())["y"].shape == (2, 7, 64)
    with pytest.raises(PlanishError, match="input 'ids': wrong size of dim 0; expected 2, got 3"):
        module(tokens(3, 7))


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


torch.export.register_dataclass(Pair, serialized_type_name="test_optimize.Pair")


class Dataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(self.a(x), x)


def test_outputs_of_a_dataclass() -> None:
    module = planish.optimize(Dataclass(), torch.randn(3, 64))
    found = module(torch.ones(5, 64))
    assert isinstance(found, Pair) and found.first.shape == (5, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_of_transformers(name: str) -> None:
    """Keyword inputs, outputs of the library's own classes."""
    module, inputs = zoo_models.build(name)
    made = planish.optimize(module, inputs, validate=False)
    with torch.no_grad():
        got, expected = made(**inputs), module(**inputs)
    assert type(got) is type(expected)
    assert list(got.keys()) == list(expected.keys())
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert distance(got[key], value) <= LOSS
    longer = {k: torch.cat([v, v], -1) if v.ndim == 2 else v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        assert distance(made(**longer)[0], module(**longer)[0]) <= LOSS


# -- calibration ---------------------------------------------------------------------------------


def test_calibration_in_the_form_of_the_inputs(block: Block) -> None:
    batches = [tokens(2, 16, seed) for seed in range(3)]
    made = planish.optimize(block, tokens(), "w8a8-static", batches)
    with torch.no_grad():
        assert distance(made(tokens())["y"], block(tokens())["y"]) <= 4 * LOSS
    assert made.planish.notes == ()
    graph = made.planish.graph
    forms: list[Any] = [
        [(b,) for b in batches],
        [{"ids": b} for b in batches],
        ({"ids": b.numpy()} for b in batches),
        CalibrationOptions([((b,), {}) for b in batches], rows=2048),
    ]
    for form in forms:
        held = calibration_of(form, graph)
        held = held.data if isinstance(held, CalibrationOptions) else held
        for found, batch in zip(held, batches, strict=True):
            assert list(found) == ["ids"] and torch.equal(torch.as_tensor(found["ids"]), batch)


def test_wrong_calibration(block: Block, optimised: OptimizedModule) -> None:
    with pytest.raises(PlanishError, match="calibration: expected batches, got one Tensor"):
        calibration_of(tokens(), optimised.planish.graph)
    form = "calibration: a batch does not have the form of the example inputs; the inputs are ids"
    with pytest.raises(PlanishError, match=form):
        list(calibration_of([(tokens(), tokens())], optimised.planish.graph))
    with pytest.raises(PlanishError, match="calibration: no data; expected at least one batch"):
        planish.optimize(block, tokens(), "w8a8-static", [])
    with pytest.raises(PlanishError, match="recipe 'w8a8-static': needs calibration data"):
        planish.optimize(block, tokens(), "w8a8-static")


# -- what cannot be optimised --------------------------------------------------------------------


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


def test_nothing_to_quantise() -> None:
    with pytest.raises(PlanishError) as caught:
        planish.optimize(Sum(), torch.randn(2, 8))
    assert caught.value.what == "Sum: nothing was quantised by recipe 'w8a8-token'"
    assert caught.value.where == "no linear, convolution or embedding with a constant float weight"
    assert "planish.inspect" in str(caught.value.hint)


def test_nothing_that_may_be_quantised(block: Block) -> None:
    with pytest.raises(PlanishError) as caught:
        planish.optimize(block, tokens(), "raise,quantize{skip=.* embeddings=none}")
    assert "8 x skipped by name" in str(caught.value.where)


def test_no_module() -> None:
    with pytest.raises(PlanishError, match=r"model: expected a torch.nn.Module, got str") as caught:
        planish.optimize("model.onnx", None)  # type: ignore[arg-type]
    assert caught.value.hint == "planish.convert takes ONNX files"


def test_no_such_recipe(block: Block) -> None:
    with pytest.raises(PlanishError, match="recipe 'w8a8-tokens': unknown"):
        planish.optimize(block, tokens(), "w8a8-tokens")


# -- state ---------------------------------------------------------------------------------------


def test_names_of_the_state(optimised: OptimizedModule, block: Block) -> None:
    """Codes and scales stand under the paths of the model's weights; floats keep their names."""
    state = optimised.state_dict()
    weights = {name for name in block.state_dict() if name.endswith("weight") and name[0] in "qkvogud"}
    for name in weights:
        assert state[f"{name}.codes"].dtype in (torch.int8, torch.uint8)
        assert f"{name}.scale" in state and name not in state
    assert {name for name in block.state_dict() if name not in weights} <= {*state}
    assert not any(name.startswith(("gemm_", "prologue_")) for name in state)
    codes, scale = state["o.weight.codes"].float(), state["o.weight.scale"]
    assert distance(codes * scale[:, None], block.o.weight.detach()) <= 0.01


@pytest.fixture(scope="module")
def another() -> OptimizedModule:
    return planish.optimize(model(1), tokens(), "raise,quantize{embeddings=none activations=int8:token}")


@pytest.mark.parametrize("nested", [False, True])
def test_loading_a_state(nested: bool, optimised: OptimizedModule, another: OptimizedModule) -> None:
    other = copy.deepcopy(another)
    before, expected = other(tokens())["y"], optimised(tokens())["y"]
    if nested:
        nn.Sequential(other).load_state_dict(nn.Sequential(optimised).state_dict())
    else:
        assert str(other.load_state_dict(optimised.state_dict())) == "<All keys matched successfully>"
    got = other(tokens())["y"]
    assert torch.equal(got, expected) and not torch.equal(before, expected)


def test_states_that_do_not_fit(optimised: OptimizedModule) -> None:
    state = dict(optimised.state_dict())
    missing = {k: v for k, v in state.items() if k != "o.weight.codes"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"o.weight.codes"'):
        copy.deepcopy(optimised).load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"o.weight.other"'):
        copy.deepcopy(optimised).load_state_dict(state | {"o.weight.other": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"'o.weight.codes': expected shape \(64, 64\), got \(2, 2\)"):
        copy.deepcopy(optimised).load_state_dict(state | {"o.weight.codes": torch.ones(2, 2)})
    made = copy.deepcopy(optimised)
    found = made.load_state_dict(missing, strict=False)
    assert found.missing_keys == ["o.weight.codes"] and not found.unexpected_keys
    assert torch.equal(made(tokens())["y"], optimised(tokens())["y"])


# -- copies --------------------------------------------------------------------------------------


def test_deep_copies(optimised: OptimizedModule) -> None:
    made = copy.deepcopy(optimised)
    assert torch.equal(made(tokens())["y"], optimised(tokens())["y"])
    expected = optimised(tokens())["y"]
    made.gemm_7.weight.zero_()
    assert not torch.equal(made(tokens())["y"], expected)
    assert torch.equal(optimised(tokens())["y"], expected)
    listed = copy.deepcopy([optimised, optimised])
    assert listed[0] is listed[1]


def test_what_is_written_in_place_is_copied(another: OptimizedModule) -> None:
    module = copy.deepcopy(another)
    before = module(tokens())["y"]
    with torch.no_grad():
        module.get_parameter("table.weight").mul_(2.0)
    expected = module(tokens())["y"]
    assert not torch.equal(before, expected)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 - its own
        assert torch.equal(made(tokens())["y"], expected)
    with torch.no_grad():  # a copy is apart
        copy.deepcopy(module).get_parameter("table.weight").zero_()
    assert torch.equal(module(tokens())["y"], expected)


LOAD = """
import pickle, sys, torch
from safetensors.torch import load_file
with open(sys.argv[1], "rb") as file:
    module = pickle.load(file)
held = load_file(sys.argv[2])
print(type(module).__name__, torch.equal(module(held["ids"])["y"], held["y"]))
"""


def test_classes_of_outputs_are_imported() -> None:
    """A process that reads a pickle knows the classes of the module's outputs, as torch.utils._pytree must."""
    module = planish.optimize(Dataclass(), torch.randn(3, 64))
    (_, held) = module.__reduce__()
    assert held[-1] == (Pair,)


def test_pickled_to_another_process(optimised: OptimizedModule, tmp_path: Path) -> None:
    (tmp_path / "module.pickle").write_bytes(pickle.dumps(optimised))
    save_file({"ids": tokens(), "y": optimised(tokens())["y"].contiguous()}, tmp_path / "held.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "module.pickle", tmp_path / "held.safetensors"],
        capture_output=True, text=True, check=False, env=dict(os.environ), cwd=HERE.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "OptimizedModule True", done.stderr


# -- devices and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_emits_anew(dtype: torch.dtype, optimised: OptimizedModule) -> None:
    made = copy.deepcopy(optimised).to(dtype)
    assert made.planish.dtype == dtype
    assert kernels(made) == (0 if dtype == torch.float64 else ON_CPU)
    assert all(p.dtype == dtype for p in made.parameters())
    got, expected = made(tokens())["y"], optimised(tokens())["y"]
    assert got.dtype == dtype and distance(got, expected) <= LOSS
    assert {*made.state_dict()} == {*optimised.state_dict()}
    back = made.float()
    assert back.planish.dtype == torch.float32 and kernels(back) == ON_CPU
    assert distance(back(tokens())["y"], expected) <= LOSS


def test_nothing_is_emitted_where_nothing_changes(optimised: OptimizedModule) -> None:
    before = optimised.graph
    assert optimised.to("cpu").float().cpu() is optimised
    assert optimised.graph is before


def test_another_device_gets_triton(optimised: OptimizedModule) -> None:
    made = copy.deepcopy(optimised).to("meta")
    assert (kernels(made), kernels(made, "planish")) == (0, KERNELS)
    assert made(tokens().to("meta"))["y"].shape == (2, 7, 64)


def test_training_mode_is_kept(optimised: OptimizedModule) -> None:
    made = copy.deepcopy(optimised).train()
    assert made.half().training and copy.deepcopy(made).training
    assert not any(p.requires_grad for p in made.parameters())


# -- files ---------------------------------------------------------------------------------------


def test_saved_and_loaded(optimised: OptimizedModule, tmp_path: Path) -> None:
    path = tmp_path / "q.ir"
    planish.save_module(optimised, path)
    text, data = sorted(p.name for p in tmp_path.iterdir())
    assert (text, data.endswith(".safetensors")) == ("q.ir", True)
    made = planish.load_module(path)
    assert made.planish.recipe == "w8a8-token"
    assert torch.equal(made(tokens())["y"], optimised(tokens())["y"])
    assert made.planish.graph == optimised.planish.graph
    assert load_file(tmp_path / data)["o.weight.codes"].dtype == torch.int8  # as any reader of safetensors sees it


def test_a_dtype_is_saved(optimised: OptimizedModule, tmp_path: Path) -> None:
    made = copy.deepcopy(optimised).bfloat16()
    planish.save_module(made, tmp_path / "q.ir")
    loaded = planish.load_module(tmp_path / "q.ir")
    assert loaded.planish.dtype == torch.bfloat16
    assert torch.equal(loaded(tokens())["y"], made(tokens())["y"])


def test_an_interrupted_save_leaves_the_old_pair(
    optimised: OptimizedModule, another: OptimizedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "q.ir"
    planish.save_module(optimised, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planish.save_module(another, path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_that_cannot_be_saved(optimised: OptimizedModule, block: Block, tmp_path: Path) -> None:
    for module, path, message in (
        (block, "q.ir", "module: a Block cannot be saved; expected what planish.optimize returns"),
        (optimised, "q.pt", "q.pt: unknown kind of file; expected .ir"),
        (optimised, "missing/q.ir", "missing/q.ir.*: cannot be written"),
    ):
        with pytest.raises(PlanishError, match=message):
            planish.save_module(module, tmp_path / path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_loaded(block: Block, tmp_path: Path) -> None:
    from planish.ir.store import save

    with pytest.raises(PlanishError, match=r"q.ir: cannot be read: No such file"):
        planish.load_module(tmp_path / "q.ir")
    save(planish.capture(block, tokens()), tmp_path / "float.ir")
    with pytest.raises(PlanishError, match=r"float.ir: nothing in this graph is quantised"):
        planish.load_module(tmp_path / "float.ir")
    (tmp_path / "other.ir").write_text("graph")
    with pytest.raises(PlanishError, match=r"other.ir"):
        planish.load_module(tmp_path / "other.ir")


# -- torch's own forms ---------------------------------------------------------------------------


def test_exported(optimised: OptimizedModule) -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(optimised, (tokens(),), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    for batch, length in ((2, 7), (3, 9)):
        ids = tokens(batch, length)
        assert torch.equal(program.module()(ids)["y"], optimised(ids)["y"])
    again = planish.capture(program)  # and planish reads it again
    assert np.isfinite(planish.evaluate(again, {"ids": tokens()})["y"].numpy()).all()


def test_compiled(optimised: OptimizedModule) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 9)):
        ids = tokens(batch, length)
        assert torch.allclose(compiled(ids)["y"], optimised(ids)["y"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8-token", "w4a16", "w4a8", "svdquant", "splitquant", "llm-int8", "w8a8-static"])
def test_compiled_by_inductor(recipe: str, block: Block) -> None:
    torch._dynamo.reset()
    module = planish.optimize(block, tokens(), recipe, [tokens(2, 16, seed) for seed in range(3)])
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch, length in ((2, 7), (3, 9)):
        ids = tokens(batch, length)
        # ATen ops are compiled to other orders of sums: codes may flip by one, at most a step of 1 / 127, or of 1 / 7
        assert distance(compiled(ids)["y"], module(ids)["y"]) <= (1 / 7 if recipe == "svdquant" else 1 / 127)


# -- numbers at the border of what floats hold -------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with a mask of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (one(x).unflatten(2, (4, 16)).transpose(1, 2) for one in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["least", -1e30, -1e9])
def test_rows_whose_keys_are_all_masked_by_finite_numbers(masked: str | float, dtype: torch.dtype) -> None:
    """What transformers write: such a row weighs all keys alike, beside rows that see some of them."""
    torch.random.manual_seed(0)
    attention = Attention().eval().requires_grad_(False).to(dtype)
    value = torch.finfo(dtype).min if masked == "least" else masked
    for tokens in (9, 40, 600):
        x, mask = torch.randn(2, tokens, 64, dtype=dtype), torch.zeros(tokens, tokens, dtype=dtype)
        mask[0], mask[1, : tokens // 2], mask[3, 1:] = value, value, value
        expected, got = attention(x, mask), planish.optimize(attention, (x, mask))(x, mask)
        for row in range(4):
            assert distance(got[:, row], expected[:, row]) <= LOSS, (tokens, row)


RECIPES_AT_RUN_TIME = [
    "raise,quantize{activations=int8:token}", "raise,quantize{activations=uint8:token}",
    "raise,quantize{activations=int8:g32}", "raise,quantize{weights=int4:g32 activations=int4:g32}",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES_AT_RUN_TIME)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_stays_none_and_alone(recipe: str, bad: float) -> None:
    torch.random.manual_seed(0)
    layers = {
        "linear": nn.Linear(64, 40),
        "norms": nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 33)),
        "relu": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 40)),
    }
    for name, model in layers.items():
        module = planish.optimize(model.eval().requires_grad_(False), torch.randn(9, 64), recipe)
        for rows in (1, 3, 40, 100):
            x = torch.randn(rows, 64)
            clean = module(x)
            x[rows // 2, 5] = bad
            float_row, row = model(x)[rows // 2], module(x)[rows // 2]
            assert not row[~float_row.isfinite()].isfinite().any(), (name, rows)
            others = torch.arange(rows) != rows // 2
            assert torch.equal(module(x)[others], clean[others]), (name, rows)


@pytest.mark.parametrize("recipe", ["w8a8-token", "raise,quantize{weights=int4:g32}"])
def test_one_output(recipe: str) -> None:
    """Its scale and its bias are numbers without an axis."""
    torch.random.manual_seed(0)
    for model in (nn.Linear(64, 1), nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 1, bias=False))):
        module = planish.optimize(model.eval().requires_grad_(False), torch.randn(4, 64), recipe)
        x = torch.randn(50, 64)
        assert distance(module(x), model(x)) <= 5 * LOSS
        assert distance(module(x), planish.to_torch(module.planish.graph)(x)) <= 1e-6
