"""bench/backend.py: its models compute one function in all cases, targets can be missed, dead workers are reported."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = str(Path(__file__).resolve().parents[1] / "bench")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The bench's modules, with a decoder that is small."""
    monkeypatch.syspath_prepend(BENCH)
    import backend
    import backend_engines
    import backend_models
    import backend_processes

    for name, value in {"VOCABULARY": 50, "WIDTH": 32, "HIDDEN": 48, "HEADS": 4, "KEYS": 2, "SIZE": 8}.items():
        monkeypatch.setattr(backend_models, name, value)
    return types.SimpleNamespace(
        main=backend, engines=backend_engines, models=backend_models, processes=backend_processes
    )


def test_a_token_behind_a_cache_is_the_last_token_of_the_prompt(bench: types.SimpleNamespace, tmp_path: Path) -> None:
    models = bench.models
    net = models.decoder(2)
    models.write_cache(net, tmp_path)
    case = models.case_of("decoder token")
    given = models.inputs(case, tmp_path)
    assert tuple(given) == models.names_of(case, 2)
    ids = torch.from_numpy(models.tokens(models.PAST + 1))
    cos, sin = (torch.from_numpy(a) for a in models.angles(range(models.PAST + 1)))
    whole, *_ = net(ids, cos, sin)
    step, *new = net(*models.arguments(case, given))
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)
    assert [tuple(t.shape) for t in new] == [(2, 2, 1, 8)] * 2


def test_every_process_makes_the_same_weights(bench: types.SimpleNamespace) -> None:
    one, two = (bench.models.decoder(1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_operations_count_the_weights(bench: types.SimpleNamespace) -> None:
    models = bench.models
    net = models.decoder(3)
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    products, _, counted = models.operations(models.case_of("decoder token"), 3)
    assert counted == weights
    assert products == 2.0 * weights
    products, _, _ = models.operations(models.case_of("decoder prefill"), 3)
    head = net.head.weight.numel()
    assert products == 2.0 * (models.PROMPT * (weights - head) + head)  # logits of the last token only


def row(ms: float, cosine: float = 1.0) -> dict[str, float]:
    return {"ms": ms, "cosine": cosine}


def test_targets_take_the_best_form_of_each_opponent(bench: types.SimpleNamespace) -> None:
    case = bench.models.case_of("minilm 8x128")
    figures: dict[str, Any] = {
        "Inductor bf16": row(12.0), "Inductor bf16 frozen": row(10.0), "OpenVINO int8": row(9.0),
        "OpenVINO int8 bf16": row(8.0), "planish W8A8 fp32": row(6.0, 0.9992), "planish W8A8 bf16": row(5.0, 0.9985),
    }  # fmt: skip
    found = {t.name: t for t in bench.main.speed_targets(case, 2, figures)}
    assert found["minilm 8x128 2t W8A8 / OpenVINO int8"].value == pytest.approx(8 / 5)
    assert found["minilm 8x128 2t W8A8 / Inductor bf16"].value == pytest.approx(10 / 5)
    cosine = found["minilm 8x128 2t cosine"]
    assert cosine.value == 0.9985 and not cosine.met


def test_a_row_that_did_not_run_misses_its_targets(bench: types.SimpleNamespace) -> None:
    case = bench.models.case_of("decoder token")
    figures: dict[str, Any] = {
        "Inductor bf16": row(30.0), "onnxruntime 4-bit": row(13.0), "llama.cpp Q4_0": row(12.0),
        "llama.cpp Q8_0": row(5.0), "planish W4A16 bf16": {"failed": "SIGFPE"},
    }  # fmt: skip
    found = bench.main.speed_targets(case, 1, figures)
    assert [t.name.partition(" 1t ")[2] for t in found] == ["planish / Inductor bf16", "W4A16 / best 4-bit"]
    assert not any(t.met for t in found)
    figures["planish W4A16 bf16"] = row(10.0)
    assert [t.value for t in bench.main.speed_targets(case, 1, figures)] == pytest.approx([3.0, 1.2])


def test_fractions_of_the_limits(bench: types.SimpleNamespace) -> None:
    case = bench.models.case_of("decoder token")
    held = {"int8_registers": 1e12, "int8_l2": 0.5e12, "bf16_registers": None, "memory": 1e10}
    profile = [["planish_cpu::gemm_a8", 3, 0.5e-3], ["aten::add", 2, 0.5e-3]]
    figures: dict[str, Any] = {"planish W8A8 fp32": {"ms": 1.0, "profile": profile}, "OpenVINO bf16": {"failed": "x"}}
    bench.main.fractions(case, figures, held, 2)
    made = figures["planish W8A8 fp32"]
    products, attention, weights = bench.models.operations(case, 2)
    assert made["of_int8_registers"] == pytest.approx((products + attention) / 1e-3 / 1e12)
    assert made["of_memory"] == pytest.approx(weights / 1e-3 / 1e10)  # a byte for each weight
    assert made["gemms_of_int8"] == pytest.approx(products / 0.5e-3 / 1e12)
    assert made["gemm_share"] == 0.5
    assert "of_bf16" not in made


def test_rows_read_files_that_can_be_made(bench: types.SimpleNamespace) -> None:
    import backend_files

    for case in bench.models.CASES:
        chosen = [e for e in bench.engines.ENGINES if case.model in e.models]
        wanted = bench.main.files_of(case, chosen)
        assert wanted and set(wanted) <= set(backend_files.FILES)
        for engine in chosen:
            assert engine.tool in bench.engines.BUILDERS


def test_what_kills_a_worker_is_said(bench: types.SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "python"
    job = {"engine": "eager fp32", "case": "minilm 1x128", "threads": 1}
    for text, why in (("echo boom >&2; exit 3", "boom"), ("kill -FPE $$", "SIGFPE")):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        with bench.processes.Field() as field:
            field.start("eager fp32", script, job, tmp_path)
            assert field.failed == {"eager fp32": why}
            assert not field.times(1, 1)


def test_rounds_take_turns(bench: types.SimpleNamespace, tmp_path: Path) -> None:
    script, order = tmp_path / "python", tmp_path / "order"
    script.write_text(
        "#!/bin/sh\necho '{\"ready\": 1.0}'\n"
        f"while read line; do echo $2 | cut -d'\"' -f4 >> {order}; echo '{{\"times\": [0.5, 1.5]}}'; done\n"
    )
    script.chmod(0o755)
    with bench.processes.Field() as field:
        for name in ("a", "b"):
            field.start(name, script, {"engine": name, "case": "c", "threads": 1}, tmp_path)
        times = field.times(2, 2)
    assert times == {"a": [0.5, 1.5] * 2, "b": [0.5, 1.5] * 2}
    assert order.read_text().split() == ["a", "b", "b", "a"]  # another one begins each round
    assert bench.processes.median(times["a"]) == 1.0


def test_embeddings_are_pooled_over_the_mask(bench: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import assets
    import backend_worker

    def encode(texts: list[str], length: int) -> dict[str, np.ndarray]:
        mask = np.zeros((len(texts), 4), np.int64)
        for i, text in enumerate(texts):
            mask[i, : len(text)] = 1
        return {"attention_mask": mask}

    monkeypatch.setattr(assets, "encode", encode)
    states = np.array([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0], [9.0, 9.0]]])
    case = bench.models.case_of("minilm 1x128")
    rows = backend_worker.pooled(lambda given: states, case, ["a", "ab"])
    np.testing.assert_allclose(rows, [[1.0, 0.0], [0.6, 0.8]])


# -- backend_ops ---------------------------------------------------------------------------------


class Heads(torch.nn.Module):
    """Attention of two heads over the rows of one text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).reshape(1, -1, 2, 32).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(4 * q, k, v)
        return mixed.transpose(1, 2).reshape(-1, 64)


def ops_of(bench: types.SimpleNamespace, recipe: str, *more: torch.nn.Module) -> Any:
    """What comparing the ops of a small model finds."""
    import backend_ops

    torch.random.manual_seed(0)
    layers = [torch.nn.LayerNorm(64), torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)]
    model = torch.nn.Sequential(*layers, *more).requires_grad_(False)
    evaluated = backend_ops.Evaluated({"recipe": recipe}, compared=True)
    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.randn(32, 64)
        made = torch.compile(model, backend=evaluated)(x)
    assert evaluated.graphs == 1
    assert 0 < (made - model(x)).norm() / model(x).norm() < 0.2
    return evaluated.ops


def test_kernels_compute_what_the_evaluator_does(bench: types.SimpleNamespace) -> None:
    ops = ops_of(bench, "raise,quantize{activations=int8:token}")
    assert ops.kernels == 3
    assert ops.codes == 32 * (64 + 128)
    assert ops.far <= 1 and ops.share < 0.01
    assert ops.floats < 1e-5
    ops = ops_of(bench, "raise,quantize{weights=int4:g32}")
    assert ops.kernels == 3  # the norm too
    assert 0 < ops.floats < 1e-5


@pytest.mark.parametrize("recipe", ["raise,quantize{activations=int8:token}", "raise,quantize{weights=int4:g32}"])
def test_attention_keeps_its_bound(bench: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """That of bf16 where activations are quantised, else that of float32, which bf16 does not keep."""
    import backend_ops

    ops = ops_of(bench, recipe, Heads())
    assert ops.attentions == 1 and 0 < ops.attention < 1
    assert ops.floats < 1e-5 and ops.far <= 1
    right = backend_ops.attention_bound
    monkeypatch.setattr(backend_ops, "attention_bound", lambda *given, half: right(*given, half=False))
    assert (ops_of(bench, recipe, Heads()).attention > 1) == ("int8" in recipe)


@pytest.mark.parametrize("recipe", ["raise,quantize{activations=int8:token}", "raise,quantize{weights=int4:g32}"])
def test_a_wrong_scale_is_seen(bench: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    from planish.codegen import torch_regions

    right = torch_regions.emit

    def wrong(*given: Any, **options: Any) -> Any:
        module = right(*given, **options)
        scales = [t for name, t in module.named_buffers() if "scale" in name and t.is_floating_point()]
        assert scales
        scales[-1].mul_(1.001)
        return module

    monkeypatch.setattr(torch_regions, "emit", wrong)
    assert ops_of(bench, recipe).floats > 1e-4


def test_a_code_off_by_two_is_seen(bench: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import backend_ops

    right = backend_ops._recorded

    def wrong(*given: Any) -> dict[str, Any]:
        found = right(*given)
        for held in found.values():
            for tensor in held if isinstance(held, tuple) else ():
                if tensor.dtype == torch.int8:
                    tensor[0, :8] = torch.where(tensor[0, :8] > 0, tensor[0, :8] - 2, tensor[0, :8] + 2)
        return found

    monkeypatch.setattr(backend_ops, "_recorded", wrong)
    ops = ops_of(bench, "raise,quantize{activations=int8:token}")
    assert ops.far >= 2 and ops.differing >= 8
