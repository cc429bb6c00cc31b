"""Every recipe that comes with planish, from a model to a file that runs, with the error it makes.

The bounds are the errors that were measured, times about 1.5: a recipe that breaks exceeds them by far.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import check_text
from test_docs import ROOT

import planish
from planish.integrate.convert import Conversion
from planish.integrate.recipes import builtin_names, load_recipe
from planish.ir.graph import Graph
from planish.report.results import Results

sys.path.append(str(ROOT / "bench"))
import assets
import blocks
import zoo_measure
import zoo_models

Batch = dict[str, np.ndarray]
SMALL, LARGE, TOKENS = 128, 256, 16  # widths of the generated decoders, tokens of a sample


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes:
        small: the largest relative error on a generated decoder, 128 wide, one block.
        bits: the most bits per weight on that, scales counted.
        model: of the zoo, that the recipe is for; empty: a generated decoder, 256 wide, two blocks.
        large: the largest relative error on it.
        minilm: the least mean cosine to the float embeddings of sentences; None: nothing there is for it to do.
        applied: passes that must find something on the model that the recipe is for.
    """

    small: float
    bits: float
    model: str
    large: float
    minilm: float | None
    applied: tuple[str, ...]


CASES = {
    "w8a8-dynamic": Case(0.042, 9.1, "", 0.064, 0.9983, ("shift-channels", "scale-channels")),
    "w8a8-token": Case(0.032, 9.1, "", 0.047, 0.9988, ("shift-channels", "scale-channels")),
    "w8a8-static": Case(0.088, 9.1, "", 0.13, 0.997, ("shift-channels", "scale-channels")),
    "w8a8-static-hadamard": Case(0.038, 9.1, "", 0.053, 0.99, ("scale-channels", "insert-hadamard")),
    "w8a8-token-hadamard": Case(0.038, 9.1, "", 0.053, 0.99, ("scale-channels", "insert-hadamard")),
    "smoothquant": Case(0.034, 9.1, "", 0.046, 0.9953, ("scale-channels",)),
    "os-plus": Case(0.093, 9.1, "opt", 0.13, 0.9907, ("shift-channels", "scale-channels")),
    "outliertune": Case(0.12, 9.1, "opt", 0.13, 0.9903, ("shift-channels", "scale-channels")),
    "quarot": Case(0.47, 4.7, "", 0.7, 0.7114, ("fold-norm-gain", "rotate-channels", "insert-hadamard")),
    "mambaquant": Case(0.028, 9.1, "mamba", 0.018, 0.9956, ("fold-norm-gain", "rotate-channels", "scale-channels")),
    "quamba": Case(0.51, 9.1, "mamba", 0.04, 0.9929, ("insert-hadamard",)),
    "repq-vit": Case(0.074, 9.1, "vit", 0.18, None, ("reparameterize-norm",)),
    "w4a16": Case(0.31, 6, "", 0.45, 0.976, ("scale-channels",)),
    "w4a8": Case(0.31, 6, "", 0.42, 0.976, ("scale-channels",)),
    "w4a4": Case(0.71, 17, "", 0.84, 0.93, ("insert-hadamard", "extract-low-rank")),
    "w2a16": Case(1.2, 7.5, "", 1.4, 0.59, ("split-layers",)),
    "awq": Case(0.27, 4.8, "", 0.34, 0.9533, ("scale-channels",)),
    "smoothquant-plus": Case(0.29, 4.8, "", 0.35, 0.9501, ("scale-channels",)),
    "gptq": Case(0.94, 4.7, "", 0.98, 0.966, ()),
    "splitquant": Case(1.5, 5.8, "", 1.5, 0.7428, ("split-layers",)),
    "svdquant": Case(0.28, 17, "", 0.5, 0.958, ("extract-low-rank",)),
    "svdquant-nvfp4": Case(0.23, 17, "", 0.4, 0.974, ("extract-low-rank",)),
    "llm-int8": Case(0.03, 12, "", 0.042, 0.9993, ("extract-outliers",)),
    "qllm": Case(0.93, 4.7, "", 1.1, 0.725, ("reassemble-channels",)),
}


def test_every_recipe_has_a_case() -> None:
    assert sorted(CASES) == builtin_names()


# -- running -------------------------------------------------------------------------------------


def convert(model: Any, folder: Path, name: str, batches: Sequence[Batch], **options: Any) -> tuple[Path, Conversion]:
    """The file that a recipe makes, checked: what its own passes did is in the report."""
    out = folder / f"{name}.onnx"
    done = planish.convert(model, out, name, calibration=list(batches), **options)
    reports = {p.name: p for p in done.report.passes}
    assert reports["quantize"].applied
    for wanted in CASES[name].applied:
        assert reports[wanted].applied, f"{wanted}: {reports[wanted].declined or reports[wanted].misses}"
    assert isinstance(done.report.results, Results)
    assert done.bytes_after == out.stat().st_size
    return out, done


def run(path: Path, inputs: Batch) -> dict[str, np.ndarray]:
    """The outputs in ONNX Runtime, with its optimiser."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: np.asarray(inputs[i.name]) for i in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def error_of(path: Path, graph: Graph, inputs: Batch) -> float:
    """The relative error of the first output against float64."""
    name = graph.outputs[0][0]
    expected = planish.evaluate(graph, inputs, dtype=torch.float64)[name].numpy()
    got = run(path, inputs)[name]
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# -- generated decoders, and the models that the recipes are for -----------------------------------


@pytest.mark.parametrize("name", builtin_names())
def test_on_a_small_decoder(name: str, tmp_path: Path) -> None:
    graph = blocks.decoder(SMALL, tokens=TOKENS)
    check_text(graph)
    out, done = convert(graph, tmp_path, name, blocks.batches(TOKENS, 4), validate=False)
    assert error_of(out, graph, blocks.batches(TOKENS, 1, seed=2)[0]) < CASES[name].small
    assert isinstance(done.report.results, Results)
    assert done.report.results.bits_per_weight is not None
    assert done.report.results.bits_per_weight < CASES[name].bits


def model_for(name: str) -> tuple[Graph, list[Batch]]:
    """The model that a recipe is for, and five batches."""
    zoo = CASES[name].model
    if not zoo:
        return blocks.decoder(LARGE, 2, tokens=TOKENS), blocks.batches(TOKENS, 5)
    module, inputs = zoo_models.build(zoo)
    graph = planish.capture(module, inputs)
    return graph, [zoo_measure.graph_inputs(graph, more) for more in zoo_models.more_inputs(zoo, 0, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin_names())
def test_on_the_model_that_it_is_for(name: str, tmp_path: Path) -> None:
    graph, batches = model_for(name)
    for target in load_recipe(name).needs.targets:
        folder = tmp_path / target
        folder.mkdir()
        out, _ = convert(graph, folder, name, batches[:4], target=target)
        assert error_of(out, graph, batches[4]) < CASES[name].large, target


@pytest.fixture(scope="module")
def sentences() -> tuple[Path, list[Batch], list[Batch]]:
    """MiniLM, 32 sentences to calibrate on, and 16 others."""

    def batches(split: str, count: int) -> list[Batch]:
        texts = assets.sentences(split, count)
        return [assets.encode(texts[i : i + 8], 64) for i in range(0, count, 8)]

    return assets.minilm_onnx(), batches("calibration", 32), batches("judge", 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [n for n in builtin_names() if CASES[n].minilm])
def test_on_minilm(name: str, sentences: tuple[Path, list[Batch], list[Batch]], tmp_path: Path) -> None:
    model, calibration, judged = sentences
    out, _ = convert(model, tmp_path, name, calibration)
    cosines = []
    for inputs in judged:
        mask = inputs["attention_mask"][..., None]
        one, two = ((next(iter(run(path, inputs).values())) * mask).sum(1) for path in (model, out))
        cosines.append((one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1))
    assert np.concatenate(cosines).mean() > CASES[name].minilm
