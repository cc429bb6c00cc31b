"""The backend of torch.compile: options, what it leaves to Inductor, what it says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import backend_cases as cases
import pytest
import torch
from backend_cases import EAGER, Block, Stack, close, compiled, filled, numbers, reference, text_of
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import planish
from planish.integrate import backend as backend_module
from planish.integrate.backend_options import read_options
from planish.ir.errors import PlanishError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with cases.fresh(), torch.no_grad():
        yield


# -- options ---------------------------------------------------------------------------------------------------


def test_the_name_is_registered() -> None:
    (found,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "planish"]
    assert found.load() is backend_module.backend
    assert "planish" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recepi": "w4a16"}, "option 'recepi': unknown; expected recipe, calibration, .*\n  hint: .*recipe"),
        ({"recipe": "w4a61"}, "recipe 'w4a61': unknown; .*\n  hint: .*w4a16"),
        ({"recipe": 4}, "option 'recipe': expected a name, a file or a pipeline; got 4"),
        ({"recipe": "raise,quantise{}"}, "pass 'quantise': unknown"),
        ({"strict": 1}, "option 'strict': expected True or False; got 1"),
        ({"validate": "yes"}, "option 'validate': expected True or False; got 'yes'"),
        ({"seed": None}, "option 'seed': expected an integer; got None"),
        ({"target": "atan"}, "option 'target': unknown; expected auto or aten; got 'atan'\n  hint: .*aten"),
        ({"inner": "inducter"}, "option 'inner': unknown; .*\n  hint: .*inductor"),
        ({"inner": "planish"}, "option 'inner': unknown"),
        ({"inner": "eager", "freezing": True}, "option 'freezing': is one of Inductor's; the inner compiler is eager"),
        ({"calibration": 3}, "option 'calibration': expected statistics or their file; got a int"),
        ({"calibration": "none.safetensors"}, "none.safetensors: no such statistics file"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        read_options(options)


def test_a_bad_option_reaches_the_user() -> None:
    with pytest.raises(BackendCompilerFailed, match="option 'recepi': unknown"):
        torch.compile(filled(Block(), 1), backend="planish", options={"recepi": "w4a16"})(numbers(4, 32))


def test_mode_and_options_are_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def inductor(mode: Any, options: Any, dynamic: Any) -> Any:
        given.append((mode, options))
        return lambda module, inputs: module.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", inductor)
    model, x = filled(Block(), 1), numbers(4, 32)
    options = {"recipe": "w8a8-token", "target": "aten", "max_autotune": True, "triton.cudagraphs": False}
    options["size_asserts"] = True
    with cases.fresh_warnings([]):
        torch.compile(model, backend="planish", options=options)(x)
    torch._dynamo.reset()
    torch.compile(model, backend="planish", mode="reduce-overhead")(x)
    own = {"max_autotune": True, "triton.cudagraphs": False, "size_asserts": True}
    assert given == [(None, {**backend_module.UNCHECKED, **own}), ("reduce-overhead", backend_module.UNCHECKED)]


@pytest.mark.parametrize("recipe", ["w4a16", "w4a8", "w8a8-dynamic", "splitquant", "smoothquant", "w4a4"])
def test_recipes_without_calibration(recipe: str) -> None:
    model, x = filled(Block(64), 1), numbers(4, 64)
    caught: list[Any] = []
    with cases.fresh_warnings(caught):
        found = compiled(model, recipe=recipe, strict=False)(x)
    close(found, reference(model, x, pipeline=text_of(recipe)), 1e-5)
    texts = [str(w.message) for w in caught]
    assert texts == [] if recipe == "splitquant" else len(texts) == 1 and "without calibration: left out" in texts[0]


def test_the_default_needs_no_calibration_and_says_nothing() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(torch.compile(model, backend="planish", options=EAGER)(x), reference(model, x), 1e-6)
    (only,) = cases.live()
    assert only.options.recipe == "w8a8-token" and not only.options.named


def test_a_pipeline_as_a_recipe() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    text = "raise,quantize{weights=int4:g16 embeddings=none}"
    for recipe in (text, planish.Pipeline(text)):
        close(compiled(model, recipe=recipe, validate=True)(x), reference(model, x, pipeline=text), 1e-6)
        torch._dynamo.reset()


def test_recipes_that_need_calibration_and_strict() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    with pytest.raises(BackendCompilerFailed, match="recipe 'w4a16': needs calibration\n  hint: run a few batches"):
        compiled(model, recipe="w4a16")(x)


# -- what stays in float -----------------------------------------------------------------------------------------


def test_nothing_to_quantise_is_no_reason_to_warn() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 2 + 1, -1)

    x = numbers(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(compiled(function)(x), function(x), 0.0)


class Product(nn.Module):
    """Products of activations only, and a table that is too small to quantise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(-1, -2)) @ (x + self.table)


def test_a_graph_of_which_nothing_is_quantised() -> None:
    model, x = Product().eval(), numbers(4, 32)
    close(compiled(model)(x), model(x), 0.0)
    assert cases.live() == [] or all(len(r.folds) == 0 for r in cases.live())


def given_weight(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, w)


def test_weights_that_are_not_the_models_are_a_reason_to_warn() -> None:
    x, w = numbers(4, 32), numbers(16, 32)
    with pytest.warns(UserWarning, match="the weight of linear is no parameter or buffer of the model"):
        close(compiled(given_weight, strict=False)(x, w), given_weight(x, w), 0.0)
    with pytest.raises(Exception, match="the weight of linear is no parameter or buffer of the model"):
        compiled(given_weight)(x, w)


def test_an_op_that_hides_a_layer_is_a_reason_to_warn() -> None:
    """torch's own fast path of an encoder layer: one op with all its weights."""
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval().requires_grad_(False), numbers(2, 5, 32)
    with pytest.warns(UserWarning, match="planish does not know what .*_transformer_encoder_layer_fwd.* makes of"):
        close(compiled(layer, strict=False)(x), layer(x), 1e-6)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch._dynamo.reset()
        assert float((compiled(layer)(x) - layer(x)).norm() / layer(x).norm()) < 0.05
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_gradient_keeps_a_graph_in_float() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model, strict=False)
    with torch.enable_grad():
        with pytest.warns(UserWarning, match="a graph stays in float: an output takes a gradient .run the model under"):
            found = run(x)
        assert found.requires_grad
        close(found, model(x), 0.0)
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            run(numbers(3, 7, 32))
    close(run(x), reference(model, x), 1e-6)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match="planish: an output takes a gradient"):
        compiled(filled(Stack(1), 1))(x)


def test_parameters_without_gradients_are_quantised_in_grad_mode() -> None:
    model, x = filled(Block(), 1).requires_grad_(False), numbers(4, 32)
    with torch.enable_grad():
        close(compiled(model)(x), reference(model, x), 1e-6)


def test_an_output_that_is_detached() -> None:
    class Detached(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    model, x = filled(Detached(), 1), numbers(4, 32)
    with torch.enable_grad():
        found = compiled(model)(x)
        assert not found.requires_grad and torch.is_grad_enabled()
        close(found, reference(model, x), 1e-6)


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("broken"), KeyError("broken"), OSError("broken")])
def test_an_error_in_a_pass_leaves_the_graph_to_inductor(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(backend_module, "quantised", broken)
    model, x = filled(Block(), 1), numbers(4, 32)
    with pytest.warns(UserWarning, match=f"a graph stays in float: {type(error).__name__}: .*broken"):
        close(compiled(model, strict=False)(x), model(x), 0.0)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="broken"):
        compiled(model)(x)


def test_an_error_in_the_inner_compiler_leaves_the_graph_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot compile this")

    monkeypatch.setattr(backend_module, "compiled", broken)
    model, x = filled(Block(), 1), numbers(4, 32)
    with pytest.warns(UserWarning, match="RuntimeError: cannot compile this"):
        close(compiled(model, strict=False)(x), model(x), 0.0)


def test_an_error_at_a_later_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model, strict=False)
    run(x)
    with torch.no_grad():
        model.up.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="weight 'up.weight': holds infinity at .0, 0."):
        assert not bool(torch.isfinite(run(x)).all())
    with torch.no_grad():
        model.up.weight[0, 0] = 0.5
    close(run(x), reference(model, x), 1e-6)


# -- graphs of every kind ----------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A model that Dynamo cannot capture whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graph_breaks() -> None:
    model, x = filled(Broken(), 1), numbers(4, 32)
    close(compiled(model)(x), reference(model.second, reference(model.first, x)), 1e-6)
    assert counters["stats"]["unique_graphs"] == 2 and len(cases.live()) == 2


class Outputs(Block):
    """Results in a structure, a size among them, and one that is an input."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        y = super().forward(x)
        return {"y": y * scale, "pair": (y.sum(-1), x), "rows": x.shape[0], "none": None}


def test_structures_sizes_and_numbers() -> None:
    model = filled(Outputs(), 1)
    run = compiled(model)
    for rows, scale in ((4, 1.0), (6, 1.0), (9, 2.5), (5, 3.5)):
        x = numbers(rows, 32)
        found = run(x, scale)
        y = reference(_only(model), x)
        assert found["rows"] == rows and type(found["rows"]) is int and found["none"] is None
        close(found["y"], y * scale, 1e-6)
        close(found["pair"][0], y.sum(-1), 1e-5)
        assert found["pair"][1] is x


def _only(model: Block) -> Block:
    """The block itself, with the model's weights."""
    block = Block().eval()
    block.load_state_dict(model.state_dict())
    return block


def test_a_function_over_a_module() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)

    def function(x: torch.Tensor) -> torch.Tensor:
        return model(x) * 2

    close(compiled(function)(x), reference(model, x) * 2, 1e-6)


def test_autocast() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model, strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(x), model(x)
    assert found.dtype == expected.dtype
    close(found, expected, 0.05)
    close(run(x), reference(model, x), 1e-6)


# -- Inductor ----------------------------------------------------------------------------------------------------


def test_inductor_compiles_what_planish_made() -> None:
    model = filled(Block(), 1)
    run = torch.compile(model, backend="planish", options={"strict": True}, dynamic=True, fullgraph=True)
    for shape in ((4, 32), (7, 32)):
        x = numbers(*shape)
        close(run(x), reference(model, x), 1e-5)
    model.up.weight.mul_(1.5)
    close(run(x), reference(model, x), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_left_to_inductor_is_inductors() -> None:
    model, x = filled(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 1), numbers(4, 8)
    options = {"recipe": "raise,quantize{skip=[.*]}"}
    with pytest.warns(UserWarning, match="nothing can be quantised: .*skip"):
        found = torch.compile(model, backend="planish", options=options)(x)
    torch._dynamo.reset()
    close(found, torch.compile(model)(x), 0.0)
