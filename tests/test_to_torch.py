"""Torch code of graphs: every row by itself, the life of a module, models of torch and of ONNX."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 (that a module survives it is what is tested)
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import block_models
import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers import check_text, random_inputs, relative_error
from torch.utils import _pytree as pytree

import planish
import planish.codegen.torch  # (registers the emitters)
from planish.codegen.torch_emission import EMITTERS, READS, python_name
from planish.ir import ops
from planish.ir.audit_instances import instances
from planish.ir.audit_trial import Trial
from planish.ir.constant import Constant
from planish.ir.graph import Graph
from planish.ir.parser import parse_type
from planish.ir.text import parse
from planish.ir.types import torch_dtype

ROWS = [(name, index) for name, found in instances().items() for index in range(len(found))]


def row_graph(name: str, index: int) -> tuple[Graph, dict[str, torch.Tensor]]:
    """An audit instance as a graph with its inputs."""
    trial = Trial(ops.table()[name], instances()[name][index], np.random.default_rng(index))
    graph = trial.graph
    for place, result in enumerate(trial.node.results):
        graph.add_output(f"y{place}", result)
    check_text(graph)
    inputs = {}
    for value in graph.inputs:
        data = torch.from_numpy(np.array(trial.data[int(value.name.removeprefix("operand"))]))
        if tuple(data.shape) != value.shape:  # an operand that the trial computes from the input
            data = torch.zeros([int(d) for d in value.shape or ()])  # type: ignore[arg-type]
        inputs[value.name] = data.to(torch_dtype(value.dtype or "f32"))
    return graph, inputs


def outputs(graph: Graph, made: Any) -> Mapping[str, torch.Tensor]:
    """What a module of an ONNX graph (or one without a front end) returns, by name."""
    return made if isinstance(made, dict) else {graph.outputs[0][0]: made}


def test_every_row_has_torch_code() -> None:
    """A row without an emitter, or with an attribute that its emitter does not know of, fails here."""
    for name, row in ops.table().items():
        assert name in EMITTERS, f"'{name}' has no emitter: add one to planish/codegen/torch_ops.py"
        unread = set(row.attributes) - READS[name]
        assert not unread, f"the emitter of '{name}' does not know of {unread}: read it and say so in `reads`"
    assert set(EMITTERS) == set(ops.table())


@pytest.mark.parametrize(("name", "index"), ROWS, ids=[f"{n}-{i}" for n, i in ROWS])
def test_row(name: str, index: int) -> None:
    """The code computes what the row does: in the graph's dtypes, and in float64."""
    graph, inputs = row_graph(name, index)
    got = outputs(graph, planish.to_torch(graph)(*inputs.values()))
    expected = planish.evaluate(graph, inputs)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert got[key].shape == value.shape
        assert relative_error(got[key], value) <= 2e-6
    module = planish.to_torch(graph, dtype=torch.float64)
    wide = [x.double() if x.is_floating_point() else x for x in inputs.values()]
    got = outputs(graph, module(*wide))
    for key, value in planish.evaluate(graph, inputs, dtype=torch.float64).items():
        assert relative_error(got[key], value) <= 1e-10


# -- the life of a module --------------------------------------------------------------------------------


def same(one: Any, two: Any) -> bool:
    """Bit for bit the same structure of tensors."""
    mine, theirs = pytree.tree_leaves(one), pytree.tree_leaves(two)
    return len(mine) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(mine, theirs, strict=True)
    )


class Norm(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width).abs() + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Attention(torch.nn.Module):
    """Grouped heads with rotary positions that it computes itself."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.heads, self.key_heads = heads, key_heads
        self.q = torch.nn.Linear(width, width, bias=False)
        self.k = torch.nn.Linear(width, key_heads * self.size, bias=False)
        self.v = torch.nn.Linear(width, key_heads * self.size, bias=False)
        self.o = torch.nn.Linear(width, width, bias=False)
        self.register_buffer("rates", 10000.0 ** -(torch.arange(0, self.size, 2) / self.size), persistent=False)

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat((-two, one), -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        angles = torch.outer(torch.arange(length, device=x.device).to(torch.float32), self.rates).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(batch, length, self.key_heads, -1).transpose(1, 2)
        v = self.v(x).view(batch, length, self.key_heads, -1).transpose(1, 2)
        q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class Decoder(torch.nn.Module):
    """A tiny decoder with a tied head, keyword arguments and a dict of outputs."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "norm_1": Norm(width),
                    "attention": Attention(width, 4, 2),
                    "norm_2": Norm(width),
                    "gate": torch.nn.Linear(width, 24, bias=False),
                    "up": torch.nn.Linear(width, 24, bias=False),
                    "down": torch.nn.Linear(24, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = Norm(width)
        self.head = torch.nn.Linear(width, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: float = 1.0, hidden: bool = False) -> dict[str, Any]:
        x = self.embed(ids) * scale
        for layer in self.layers:
            x = x + layer["attention"](layer["norm_1"](x))
            y = layer["norm_2"](x)
            x = x + layer["down"](torch.nn.functional.silu(layer["gate"](y)) * layer["up"](y))
        x = self.norm(x)
        return {"logits": self.head(x), "states": (x,) if hidden else None}


class Net(torch.nn.Module):
    """Convolutions, batch norm, pools, a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = torch.nn.Conv2d(8, 12, 1)
        self.group = torch.nn.GroupNorm(3, 12)
        self.head = torch.nn.Linear(12, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.hardswish(self.norm(self.stem(image)))
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        x = torch.nn.functional.mish(self.group(self.wide(self.deep(x))))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(torch.nn.Module):
    """Layer norms, eager attention with a mask, gelu."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, width)
        self.place = torch.nn.Embedding(32, width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 40), torch.nn.Linear(40, width)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = ids.shape
        x = self.norm_1(self.embed(ids) + self.place(torch.arange(length, device=ids.device)))
        q, k, v = self.qkv(x).view(batch, length, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / 2.0
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = self.norm_2(x + self.out(y))
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return x, x[:, 0].tanh()


class Counter(torch.nn.Module):
    """It writes to a buffer and to a part of a local tensor."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.total.clone()
        self.total += x.sum(0)
        y = x.clone()
        y[:, 0] = 1.0
        return before, y * self.total


class Nested(torch.nn.Module):
    def forward(
        self, pair: tuple[torch.Tensor, torch.Tensor], named: dict[str, torch.Tensor], *, twice: bool = False
    ) -> list[torch.Tensor]:
        one, two = pair
        y = one @ two + named["bias"]
        return [y, (y * 2 if twice else y).relu()]


def planted(make: type[torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    """The module with weights that hide nothing: no gain of one, no bias of zero."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MODELS: dict[str, tuple[type[torch.nn.Module], Any]] = {
    "decoder": (Decoder, {"ids": IDS, "scale": 0.3, "hidden": True}),
    "encoder": (Encoder, {"ids": IDS, "mask": (IDS > 1).long()}),
    "net": (Net, torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()),
}


def call(module: torch.nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return module(**inputs) if isinstance(inputs, dict) else module(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_model_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    make, inputs = MODELS[name]
    module = planted(make).to(dtype)
    inputs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs
    )
    graph = planish.capture(module, inputs)
    check_text(graph)
    again = planish.to_torch(graph)
    expected, got = call(module, inputs), call(again, inputs)
    assert same(got, expected)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert set(again.state_dict()) == set(own)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in own.items())
    again.load_state_dict(own)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


class Across(torch.nn.Module):
    """A linear on a transposed input: torch takes another kernel for it where its weight takes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(6, 5)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(x.transpose(1, 2))
        self.mean.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return y - self.mean


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_are_kept(trained: bool) -> None:
    x = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0))
    module = Across().requires_grad_(trained).eval()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.dim()))
    graph = planish.capture(module, x)
    check_text(graph)
    assert graph.meta["torch.requires_grad"] == (("out.weight", "out.bias") if trained else ())
    again = planish.to_torch(graph)
    for _ in range(2):
        assert torch.equal(again(x), module(x))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {"out.weight": trained, "out.bias": trained}
    assert not again.mean.requires_grad
    assert torch.equal(again.mean, module.mean)
    assert again.out.weight.data_ptr() != module.out.weight.data_ptr()
    assert copy.deepcopy(again).out.weight.requires_grad == trained


def test_gradients_are_those_of_the_module() -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Linear(6, 5)
    again = planish.to_torch(planish.capture(module, x))
    for made in (module, again):
        made(x).square().sum().backward()
    assert torch.equal(again.weight.grad, module.weight.grad)


class Function(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: torch.Tensor) -> Any:
        return self.function(*xs)


SCALED = {
    "add": lambda x, y: x.add(y, alpha=0.1),
    "add_": lambda x, y: x.clone().add_(y, alpha=0.1),
    "sub": lambda x, y: x.sub(y, alpha=0.3),
    "sub_": lambda x, y: x.clone().sub_(y, alpha=0.3),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=0.7),
    "rsub number": lambda x, y: torch.rsub(x, 0.3, alpha=0.7),
}


@pytest.mark.parametrize("name", list(SCALED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_with_a_factor_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 33, generator=generator).to(dtype) for _ in range(2))
    module = Function(SCALED[name])
    graph = planish.capture(module, (x, y))
    check_text(graph)
    assert not any(node.op.opaque for node in graph.nodes)
    assert torch.equal(planish.to_torch(graph)(x, y), module(x, y))


def test_keys_and_classes_of_outputs() -> None:
    """A dict has the keys that it had, a result of torch the class that it had, as torch.export keeps them."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    module = Function(lambda x: {3: x + 1, "a": (x, [x.max(-1)]), "b": torch.aminmax(x)})
    graph = planish.capture(module, x)
    check_text(graph)
    assert graph.meta["torch.out_classes"] == ((5, "max"), (8, "aminmax"))
    again = planish.to_torch(graph)
    assert pytree.tree_structure(again(x)) == pytree.tree_structure(module(x))
    loaded = pickle.loads(pickle.dumps(again))  # noqa: S301
    for made in (again(x), loaded(x), torch.export.export(again, (x,)).module()(x)):
        assert list(made) == [3, "a", "b"]
        assert type(made["a"][1][0]) is torch.return_types.max
        assert type(made["b"]) is torch.return_types.aminmax
        assert torch.equal(made["a"][1][0].indices, x.max(-1).indices)


def test_folded_constants() -> None:
    """Folds of sizes and counts keep the bits; a fold of floats is computed in float64 and rounded once."""
    for name in MODELS:
        module, inputs = planted(MODELS[name][0]), MODELS[name][1]
        graph = planish.Pipeline("fold-constants").run(planish.capture(module, inputs))[0]
        got, expected = call(planish.to_torch(graph), inputs), call(module, inputs)
        if name != "decoder":  # which computes its angles
            assert same(got, expected)
        for one, two in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
            assert relative_error(one, two) <= 2e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_module_lives(name: str) -> None:
    """Deep copies, export, a saved program and torch.compile give the same bits."""
    make, inputs = MODELS[name]
    graph = planish.capture(planted(make), inputs)
    module = planish.to_torch(graph)
    expected = call(module, inputs)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    copied = copy.deepcopy(module)
    assert same(call(copied, inputs), expected)
    program = torch.export.export(module, args, kwargs, strict=False)
    assert same(call(program.module(), inputs), expected)
    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    assert same(call(torch.export.load(held).module(), inputs), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert same(call(compiled, inputs), expected)


def test_pickle_in_another_process(tmp_path: Path) -> None:
    inputs = MODELS["decoder"][1]
    module = planish.to_torch(planish.capture(planted(Decoder), inputs))
    expected = call(module, inputs)
    (tmp_path / "module.bin").write_bytes(pickle.dumps((module, inputs)))
    code = (
        "import pickle, sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # sums are cut by it
        "module, inputs = pickle.load(open(sys.argv[1], 'rb'))\n"
        "made = module(**inputs)\n"
        "wide = module.double()(**inputs)\n"
        "assert wide['logits'].dtype == torch.float64\n"
        "open(sys.argv[2], 'wb').write(pickle.dumps(made))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "module.bin"), str(tmp_path / "made.bin")]
    subprocess.run(command, check=True, timeout=120)
    assert same(pickle.loads((tmp_path / "made.bin").read_bytes()), expected)  # noqa: S301


def test_dynamic_shapes_survive() -> None:
    """Captured, written, exported, captured again: still for any batch and length."""
    inputs = MODELS["encoder"][1]
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=32)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    module = planted(Encoder)
    graph = planish.capture(module, inputs, dynamic_shapes=shapes)
    again = planish.to_torch(graph)
    assert ".item(" not in again.code
    assert "elements(" not in again.code
    other = {"ids": torch.arange(21).reshape(3, 7), "mask": torch.ones(3, 7, dtype=torch.int64)}
    assert same(call(again, other), call(module, other))
    program = torch.export.export(again, (), inputs, dynamic_shapes=shapes, strict=False)
    assert same(call(program.module(), other), call(module, other))
    twice = planish.to_torch(planish.capture(program))
    assert same(call(twice, other), call(module, other))


def test_module_that_writes_to_a_buffer() -> None:
    """Its output is the old value, the buffer holds the new one, call after call."""
    module, x = Counter(), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    again = planish.to_torch(planish.capture(copy.deepcopy(module), x))
    for factor in (1.0, -2.0, 0.5):
        assert same(again(x * factor), module(x * factor))
        assert torch.equal(again.total, module.total)
    assert list(again.state_dict()) == ["total"]


def test_nested_arguments() -> None:
    x = torch.linspace(-2, 2, 9).reshape(3, 3).sin()
    arguments = ((x, x + 1), {"bias": x - 2})
    module = Nested()
    again = planish.to_torch(planish.capture(module, (arguments, {"twice": True})))
    assert same(again(*arguments, twice=True), module(*arguments, twice=True))
    assert isinstance(again(*arguments, twice=True), list)
    with pytest.raises(planish.PlanishError, match="argument 'twice': the model was captured with True, got False"):
        again(*arguments, twice=False)


def test_inputs_of_another_size_are_refused() -> None:
    module = planish.to_torch(planish.capture(planted(Net), MODELS["net"][1]))
    with pytest.raises(planish.PlanishError, match="input 'image': wrong size of dim 0; expected 2, got 3"):
        module(torch.randn(3, 3, 16, 16))
    with pytest.raises(planish.PlanishError, match="input 'image': wrong rank; expected 4, got 3"):
        module(torch.randn(3, 16, 16))
    with pytest.raises(planish.PlanishError, match="input 'image': expected a tensor, got list"):
        module([1.0])


def test_inputs_of_another_dtype_are_refused() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    module = planish.to_torch(planish.capture(torch.nn.Linear(3, 2), x))
    name = "input 'input': wrong dtype; expected "
    with pytest.raises(planish.PlanishError, match=f"{name}torch.float32, got torch.float64") as refused:
        module(x.double())
    assert refused.value.hint == "convert the input, or the whole module: module.to(torch.float64)"
    with pytest.raises(planish.PlanishError, match=f"{name}torch.float32, got torch.int64") as refused:
        module(x.long())
    assert refused.value.hint == "convert it to torch.float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module.double()(x.double()).dtype == torch.float64
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(planish.PlanishError, match=f"{name}torch.bfloat16, got torch.float32"):
        module(x)
    ids = torch.tensor([[0, 2]])
    lookup = planish.to_torch(planish.capture(torch.nn.Embedding(4, 3), ids)).double()
    assert lookup(ids).dtype == torch.float64
    with pytest.raises(planish.PlanishError, match=f"{name}torch.int64, got torch.bool"):
        lookup(ids.bool())


@pytest.mark.parametrize("dtype", ["f64", "float64", "torch.float64", torch.float64])
def test_a_dtype_by_its_name(dtype: Any) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = planish.capture(torch.nn.Linear(3, 2), x)
    assert planish.to_torch(graph, dtype=dtype)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["i64", "float65", torch.int32, 64, float])
def test_a_dtype_that_is_none(dtype: Any) -> None:
    graph = planish.capture(torch.nn.Linear(3, 2), torch.ones(2, 3))
    with pytest.raises(planish.PlanishError, match="dtype: expected a float dtype of torch, got ") as refused:
        planish.to_torch(graph, dtype=dtype)
    assert refused.value.hint == 'torch.float64, or its name "float64"'


@pytest.mark.parametrize("name", list(MODELS))
def test_after_passes(name: str) -> None:
    """Rewritten graphs: to float32 rounding, and to 1e-10 where nothing is rounded to float32."""
    make, inputs = MODELS[name]
    module = planted(make)
    pipeline = planish.Pipeline("raise,fold-norm-gain,scale-channels{method=balance}")
    graph = pipeline.run(planish.capture(module, inputs))[0]
    check_text(graph)
    expected = pytree.tree_leaves(call(module, inputs))
    for got, value in zip(pytree.tree_leaves(call(planish.to_torch(graph), inputs)), expected, strict=True):
        assert relative_error(got, value) <= 1e-5
    wide = copy.deepcopy(module).double()
    inputs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs
    )
    values = {v.name: inputs[v.name] if isinstance(inputs, dict) else inputs for v in graph.inputs}
    evaluated = planish.evaluate(graph, values, dtype=torch.float64)
    got = call(planish.to_torch(graph, dtype=torch.float64), inputs)
    for value, one in zip(evaluated.values(), pytree.tree_leaves(got), strict=True):
        assert relative_error(one, value) <= 1e-10
    if name != "decoder":  # whose norms and angles are float32 whatever the module is
        for one, value in zip(pytree.tree_leaves(got), pytree.tree_leaves(call(wide, inputs)), strict=True):
            assert relative_error(one, value) <= 1e-10


# -- graphs of ONNX and written by hand ------------------------------------------------------------------


def test_onnx_model() -> None:
    """Inputs by position or by name, one output as it is, any batch and length."""
    from planish.capture.from_onnx import from_onnx

    graph = from_onnx(block_models.block(2))
    module = planish.to_torch(graph)
    inputs = random_inputs(graph, 0, {"batch": 2, "tokens": 3})
    (expected,) = planish.evaluate(graph, inputs).values()
    assert relative_error(module(inputs["x"]), expected) <= 1e-5
    assert same(module(x=inputs["x"]), module(inputs["x"]))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(module, (inputs["x"],), dynamic_shapes=({0: batch, 1: tokens},), strict=False)
    x = torch.randn(5, 4, 8)
    assert same(program.module()(x), module(x))
    assert "layers.1.down.weight" in module.state_dict()


def graph_of(text: str, **constants: np.ndarray) -> Graph:
    graph = parse(text, {name: Constant.of(array) for name, array in constants.items()})
    check_text(graph)
    return graph


def test_several_outputs_are_a_dict_and_a_default_may_be_left_out() -> None:
    graph = Graph("two")
    x = graph.add_input("x.1", parse_type("f32[n, 3]"))
    bias = graph.add_input("bias", parse_type("f32[3]"), Constant.of(np.array([1, 2, 3], np.float32)))
    total = graph.append(ops.get("add"), [x, bias]).result
    graph.add_output("sum", total)
    graph.add_output("max", graph.append(ops.get("relu"), [total]).result)
    check_text(graph)
    module = planish.to_torch(graph)
    made = module(torch.zeros(2, 3))
    assert list(made) == ["sum", "max"]
    assert made["sum"].tolist() == [[1, 2, 3]] * 2
    assert module(x_1=torch.zeros(1, 3), bias=torch.zeros(3))["sum"].tolist() == [[0, 0, 0]]


def test_sizes_are_integers() -> None:
    """A shape that is computed with tensors in the graph is computed with ints in the code."""
    graph = graph_of(
        """graph @sizes(%x: f32[n, m, 4]) {
          %two = constant : i64[1] = [2]
          %minus = constant : i64[1] = [-1]
          %one = constant : i64[] = 1
          %dims: i64[3] = shape(%x)
          %m: i64[] = gather(%dims, %one) {axis = 0}
          %axes: i64[1] = unsqueeze(%m) {axes = [0]}
          %doubled: i64[1] = mul(%axes, %two)
          %target: i64[2] = concat(%minus, %doubled) {axis = 0}
          %y: f32[*] = reshape(%x, %target)
          return %y as "y"
        }"""
    )
    module = planish.to_torch(graph)
    assert "= x.size(1)" in module.code
    assert "x.size(0)" not in module.code
    assert "tensor_of_sizes" not in module.code
    assert module(torch.zeros(2, 3, 4)).shape == (4, 6)


def test_sizes_that_only_the_data_tell() -> None:
    graph = graph_of(
        """graph @data(%x: f32[6], %shape: i64[2]) {
          %y: f32[?, ?] = reshape(%x, %shape)
          return %y as "y"
        }"""
    )
    module = planish.to_torch(graph)
    assert module(torch.arange(6.0), torch.tensor([2, 3])).shape == (2, 3)
    assert "elements(shape)" in module.code


def test_scalars_are_not_rounded_to_sixteen_bits() -> None:
    """x * 0.1 in bfloat16 is not x * bfloat16(0.1)."""
    x = torch.linspace(-3, 3, 64).to(torch.bfloat16)
    module = Scaled()
    again = planish.to_torch(planish.capture(module, x))
    assert same(again(x), module(x))
    assert not torch.equal(x * 0.1, x * torch.tensor([0.1], dtype=torch.bfloat16))
    assert "x * 0.1" in again.code


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1.0 - x * 0.1) ** 3 / 7.0


def test_ops_of_torch_without_a_row() -> None:
    """An opaque op is called with its own arguments: lists with gaps, dtypes, numbers."""
    module, x = Unusual(), torch.linspace(1, 9, 20).reshape(4, 5).sin()
    graph = planish.capture(module, x)
    assert any(node.op.opaque for node in graph.nodes)
    assert same(planish.to_torch(graph)(x), module(x))


class Unusual(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 1, 4])
        y = x.unsqueeze(1)[rows, :, columns]
        values, places = x.kthvalue(2, dim=1)
        return (
            y,
            values,
            places,
            torch.einsum("ij,kj->ik", x, x),
            torch.fft.fft(x).real,
            x.cumprod(1, dtype=torch.float64),
        )


def test_refusals() -> None:
    graph = Graph("foreign")
    x = graph.add_input("x", parse_type("f32[3]"))
    graph.add_output(
        "y", graph.append(ops.get("onnx::NonZero"), [x], names=["y"], types=[parse_type("i64[1, n]")]).result
    )
    with pytest.raises(planish.PlanishError, match="op 'onnx::NonZero': has no torch form") as refused:
        planish.to_torch(graph)
    assert "in %y: i64[1, n] = onnx::NonZero(%x)" in str(refused.value)
    assert "write the graph with planish.to_onnx" in str(refused.value)
    graph = Graph("unknown")
    x = graph.add_input("x", parse_type("f32[3]"))
    graph.add_output("y", graph.append(ops.get("torch::aten.no_such_op.default"), [x], types=[x.type]).result)
    with pytest.raises(
        planish.PlanishError, match=r"op 'torch::aten.no_such_op.default': this torch .* has no such op"
    ):
        planish.to_torch(graph)
    graph = Graph("rankless")
    x = graph.add_input("x", parse_type("f32[*]"))
    graph.add_output("y", graph.append(ops.get("flatten"), [x]).result)
    with pytest.raises(planish.PlanishError, match="%x: its rank must be known to write torch code"):
        planish.to_torch(graph)


def test_names_that_a_module_cannot_hold() -> None:
    assert python_name("onnx::MatMul_1.weight") == "onnx__MatMul_1.weight"
    assert python_name("block-1.weight") == "block-1.weight"
    assert python_name("graph.training") == "graph_.training"
    graph = Graph("names")
    x = graph.add_input("x", parse_type("f32[2]"))
    for name in ("a", "a.b", "a b", "a_b", "forward"):
        x = graph.append(ops.get("add"), [x, graph.add_constant(name, Constant.of(np.ones(2, np.float32)))]).result
    graph.add_output("y", x)
    module = planish.to_torch(graph)
    assert module(torch.zeros(2)).tolist() == [5, 5]
    assert len(module.state_dict()) == 5


# -- torch to ONNX ---------------------------------------------------------------------------------------


def grown(inputs: Any) -> Any:
    """Inputs with one more row, and tokens with two more columns."""
    if not isinstance(inputs, dict):
        return torch.cat([inputs, inputs[:1]])
    rows = {k: torch.cat([x, x[:1]]) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    return {k: torch.cat([x, x[:, :2]], 1) if isinstance(x, torch.Tensor) else x for k, x in rows.items()}


@pytest.mark.parametrize("name", list(MODELS))
def test_torch_models_as_onnx(name: str, tmp_path: Path) -> None:
    """ONNX Runtime computes what torch does, for other sizes too where the capture left them open."""
    make, inputs = MODELS[name]
    module = planted(make)
    dims = {"batch": torch.export.Dim("batch", max=64), "length": torch.export.Dim("length", max=32)}
    shapes: Any = {"ids": tuple(dims.values()), "scale": None, "hidden": None}
    if name == "encoder":
        shapes = {"ids": tuple(dims.values()), "mask": tuple(dims.values())}
    if name == "net":
        shapes = {"image": (dims["batch"], None, None, None)}
    graph = planish.capture(module, inputs, dynamic_shapes=shapes)
    check_text(graph)
    for pipeline in ("", "raise"):
        written = planish.Pipeline(pipeline).run(graph)[0] if pipeline else graph
        planish.to_onnx(written, tmp_path / "model.onnx")
        session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for given in (inputs, grown(inputs)):
            named = given if isinstance(given, dict) else {"image": given}
            feeds = {i.name: named[i.name].numpy() for i in session.get_inputs()}
            expected = [x for x in pytree.tree_leaves(call(module, given)) if isinstance(x, torch.Tensor)]
            for got, value in zip(session.run(None, feeds), expected, strict=True):
                assert relative_error(torch.from_numpy(got), value) <= 1e-5
