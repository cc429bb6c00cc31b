"""Folded weights are those of the call: whatever was done to them since Dynamo compiled."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator

import backend_cases as cases
import pytest
import torch
from backend_cases import Block, Stack, close, compiled, filled, numbers, reference
from torch import nn
from torch._dynamo.utils import counters

TOLERANCE = 1e-6  # the same ops on the same numbers, in another order


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with cases.fresh(), torch.no_grad():
        yield


def test_two_instances_share_one_compile() -> None:
    first, second, x = filled(Block(), 1), filled(Block(), 2), numbers(4, 32)
    one, two = compiled(first), compiled(second)
    expected = reference(first, x), reference(second, x)
    for _ in range(2):
        close(one(x), expected[0], TOLERANCE)
        close(two(x), expected[1], TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1
    (shared,) = cases.live()
    assert len(shared.folds) == 2 and len(shared.codes) == 1


def test_the_blocks_of_a_model_share_one_compile() -> None:
    model, x = filled(Stack(5), 1), numbers(2, 6, 32)
    expected = x
    for block in model.blocks:
        expected = reference(block, expected)
    whole = copy.deepcopy(model)
    for index, block in enumerate(whole.blocks):
        whole.blocks[index] = compiled(block)
    close(whole(x), expected, TOLERANCE)
    close(whole(x), expected, TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1
    (shared,) = cases.live()
    assert len(shared.folds) == 5 and len(shared.codes) == 1


def test_the_blocks_of_a_model_compiled_in_place() -> None:
    model, x = filled(Stack(3), 1), numbers(2, 6, 32)
    expected = reference(model, x)
    for block in model.blocks:
        block.compile(backend="planish", options=cases.EAGER)
    close(model(x), expected, 1e-5)


def changed(model: nn.Module, how: str) -> None:
    weight = model.up.weight
    match how:
        case "in place":
            weight.mul_(1.5)
        case "through a detached view":
            weight.detach()[0].add_(1.0)
        case "one element":
            model.down.bias[3] = 7.0
        case "replaced":
            model.up.weight = nn.Parameter(numbers(*weight.shape, seed=9))
        case "the memory replaced":
            weight.data = numbers(*weight.shape, seed=9)
        case "load_state_dict":
            model.load_state_dict(filled(Block(), 5).state_dict())
        case "load_state_dict by assignment":
            model.load_state_dict(filled(Block(), 5).state_dict(), assign=True)
        case "rounded by a move":
            model.half().float()
        case "optimiser":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.optim.AdamW(model.parameters(), lr=0.1).step()
        case "the norm":
            model.norm.weight.neg_()
        case "a module replaced":
            model.down = filled(nn.Linear(64, 32), 8)


@pytest.mark.parametrize(
    "how",
    ["in place", "through a detached view", "one element", "replaced", "the memory replaced", "load_state_dict",
     "load_state_dict by assignment", "rounded by a move", "optimiser", "the norm", "a module replaced"],
)  # fmt: skip
def test_changed_weights_are_folded_anew(how: str) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    before = run(x)
    changed(model, how)
    expected = reference(model, x)
    assert (before - expected).abs().max() > 1e-5
    close(run(x), expected, TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_write_in_inference_mode_is_seen() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    run(x)
    with torch.inference_mode():
        model.up.weight.mul_(1.5)
    close(run(x), reference(model, x), TOLERANCE)


def test_inference_mode_and_no_grad_compile_to_the_same_numbers() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run, expected = compiled(model), reference(model, x)
    close(run(x), expected, TOLERANCE)
    with torch.inference_mode():
        close(run(x), expected, TOLERANCE)
        close(run(x.clone()), expected, TOLERANCE)


def test_a_write_past_the_version_counter_is_the_blind_spot() -> None:
    """Stated in docs/torch-compile.md: the day that this fails the docs can say so."""
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    before = run(x)
    model.up.weight.data.mul_(1.5)
    close(run(x), before, 0.0)
    with torch.no_grad():
        model.up.weight.mul_(1.0)  # any write that is counted makes up for it
    close(run(x), reference(model, x), TOLERANCE)


def test_an_id_that_is_given_again_is_another_tensor() -> None:
    model, x = filled(nn.Sequential(nn.Linear(32, 32)), 1), numbers(4, 32)
    run = compiled(model)
    run(x)
    reused = 0
    for seed in range(5):
        before, values = id(model[0].weight), numbers(32, 32, seed=seed)
        model[0].weight = None
        gc.collect()
        made = [nn.Parameter(values) for _ in range(500)]
        found = [parameter for parameter in made if id(parameter) == before]
        reused += len(found)
        model[0].weight = found[0] if found else made[0]
        del made, found
        close(run(x), model(x), 0.05)  # other weights give other numbers altogether
    assert reused > 0  # else the test shows nothing
    close(run(x), reference(model, x), TOLERANCE)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 32)
        self.block = Block()
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.table(tokens)))


def test_tied_weights() -> None:
    model = Tied()
    filled(model, 1)
    tokens = torch.arange(12).reshape(2, 6) * 20
    run = compiled(model)
    close(run(tokens), reference(model, tokens), TOLERANCE)
    model.table.weight.mul_(2.0)
    close(run(tokens), reference(model, tokens), TOLERANCE)
    model.head.weight = nn.Parameter(numbers(300, 32, seed=3))  # no longer tied
    close(run(tokens), reference(model, tokens), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moved_to_another_dtype(dtype: torch.dtype) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    close(run(x), reference(model, x), TOLERANCE)
    model.to(dtype)
    close(run(x.to(dtype)), reference(model, x.to(dtype)), 2e-2 if dtype is torch.bfloat16 else 2e-3)
    model.float()
    close(run(x), reference(model, x), TOLERANCE)


class Lora(nn.Module):
    """What an adapter library puts in the place of a linear."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_added_after_the_compile() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    close(run(x), reference(model, x), TOLERANCE)
    adapter = Lora(model.up)
    adapter.down, adapter.up = filled(adapter.down, 5), filled(adapter.up, 6)
    model.up = adapter
    close(run(x), reference(model, x), TOLERANCE)
    model.up.up.weight.zero_()
    close(run(x), reference(model, x), TOLERANCE)


def test_training_is_torch_compiles() -> None:
    """Gradients, and the steps that they make, are those of the float model; evaluation between them is quantised."""
    model, x = filled(Block(), 1), numbers(4, 32)
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="planish", options={"inner": "aot_eager", "target": "aten"})
    mine, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        with torch.enable_grad():
            if not losses:
                with pytest.warns(UserWarning, match="stays in float: an output takes a gradient"):
                    loss = run.train()(x).square().mean()
            else:
                loss = run.train()(x).square().mean()
            loss.backward()
            twin(x).square().mean().backward()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            close(parameter.grad, other.grad, 1e-5)
        mine.step()
        theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
        losses.append(loss.item())
        run.eval()
        close(run(x), reference(model, x), 1e-5)
    assert losses[2] < losses[0]


def test_weights_of_inference_mode_stay_in_float() -> None:
    with torch.inference_mode():
        model = filled(nn.Sequential(nn.Linear(32, 32)), 1)
    x = numbers(4, 32)
    run = compiled(model, strict=False)
    with torch.inference_mode(), pytest.warns(UserWarning, match="was made in inference mode"):
        close(run(x), model(x), 0.0)
    with torch.inference_mode():
        model[0].weight.mul_(2.0)
        close(run(x), model(x), 0.0)


def test_weights_of_inference_mode_beside_others() -> None:
    model, x = filled(nn.Sequential(nn.Linear(32, 32)), 1), numbers(4, 32)
    with torch.inference_mode():
        other = filled(nn.Sequential(nn.Linear(32, 32)), 2)
    run, second = compiled(model, strict=False), compiled(other, strict=False)
    expected = reference(model, x)
    for _ in range(2):
        with torch.inference_mode(), cases.fresh_warnings([]):
            close(run(x), expected, TOLERANCE)
            close(second(x), other(x), 0.0)


class Constants(nn.Module):
    """A graph that gives out a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block(x), torch.tensor([1.0, 2.0, 3.0])


def test_a_constant_that_is_given_out_may_be_written_to() -> None:
    model, x = filled(Constants(), 1), numbers(4, 32)
    run = compiled(model)
    for _ in range(2):
        found = run(x)[1]
        close(found, torch.tensor([1.0, 2.0, 3.0]), 0.0)
        found.zero_()


class Counter(nn.Module):
    """A module that writes to what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.sum(0))
        return self.block(x) + self.seen


def test_a_buffer_that_the_graph_writes_to() -> None:
    model, x = filled(Counter(), 1), numbers(4, 32)
    run, base = compiled(model), reference(model.block, x)
    for step in range(1, 6):
        close(run(x), base + step * x.sum(0), 1e-5)
        close(model.seen, step * x.sum(0), 1e-5)
    (only,) = cases.live()
    assert len(only.folds) == 1 and len(only.codes) == 1  # nothing was folded anew


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.register_buffer("gain", torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.gain


def test_a_buffer_that_changes_at_every_call_is_not_folded_any_longer() -> None:
    model, x = filled(Scaled(), 1), numbers(4, 32)
    run, base = compiled(model), reference(model.block, x)
    caught = []
    for step in range(8):
        model.gain.fill_(float(step + 1))
        with pytest.warns(UserWarning, match="changes at every call") if step == 3 else cases.fresh_warnings(caught):
            found = run(x)
        close(found, base * (step + 1), 1e-5)
    (only,) = cases.live()
    folds = set(map(id, only.folds._folds.values()))
    model.gain.fill_(100.0)
    close(run(x), base * 100.0, 1e-5)
    assert set(map(id, only.folds._folds.values())) == folds and not caught


def test_what_no_pass_changed_is_not_held_twice() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    compiled(model)(x)
    (only,) = cases.live()
    (fold,) = only.folds._folds.values()
    floats = [t for t in fold.own if t.is_floating_point() and t.numel() >= 32 * 32]
    assert floats == []
    own = {t.data_ptr() for t in fold.own}
    assert own.isdisjoint(p.data_ptr() for p in model.parameters())


def test_graphs_share_the_constants_that_are_alike() -> None:
    model = filled(Block(), 1)
    run = compiled(model)
    run(numbers(4, 32))
    run(numbers(3, 7, 32))
    first, second = cases.live()
    one, two = ({id(t) for t in next(iter(r.folds._folds.values())).own} for r in (first, second))
    assert one == two


def test_folds_go_with_the_model() -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model)
    run(x)
    (only,) = cases.live()
    (fold,) = only.folds._folds.values()
    held, weight = [weakref.ref(t) for t in fold.own], weakref.ref(model.up.weight)
    del fold, model, run
    gc.collect()
    assert weight() is None and len(only.folds) == 0
    assert [r() for r in held if r() is not None] == []


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_compiles_leave_nothing(count: int) -> None:
    weights, constants = [], []
    for seed in range(count):
        model = filled(Block(), seed)
        run = compiled(model)
        run(numbers(4, 32))
        weights.append(weakref.ref(model.up.weight))
        for rewritten in cases.live():
            constants += [weakref.ref(t) for f in rewritten.folds._folds.values() for t in f.own]
        if seed % 2:
            torch._dynamo.reset()
        del model, run, rewritten
        gc.collect()
    assert not any(r() is not None for r in weights) and not any(r() is not None for r in constants)
    assert sum(len(r.folds) for r in cases.live()) == 0


def test_threads() -> None:
    models, x = [filled(Block(), seed) for seed in range(6)], numbers(4, 32)
    expected = [reference(model, x) for model in models]
    runs = [compiled(model) for model in models]
    runs[0](x)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for step in range(30):
                    at = (index + step) % len(models)
                    close(runs[at](x), expected[at], TOLERANCE)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    (shared,) = cases.live()
    assert len(shared.folds) == len(models) and len(shared.codes) == 1
