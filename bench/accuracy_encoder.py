"""MiniLM under quantisation: cosine of embeddings to float's, WordSim353, retrieval of WordNet definitions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import assets
import encoder
import numpy as np
from common import note

if TYPE_CHECKING:
    from planish import Graph, Stats

Run = Callable[[encoder.Inputs], np.ndarray]
JUDGED, QUICK_JUDGED = 500, 100  # sentences of Brown
CALIBRATION_SENTENCES = 256
EXAMPLES = 200


@dataclass
class Judged:
    """What a quantised encoder loses.

    Attributes:
        cosine: mean over sentences, of its embedding to float's.
        worst: the least of them.
        wordsim: Spearman correlation with human similarity, WordSim353.
        mrr: mean reciprocal rank of the definition that an example sentence belongs to, among 200.
    """

    cosine: float
    worst: float
    wordsim: float
    mrr: float


class Encoder:
    """The model, its calibration data, and the float run that all is compared with."""

    def __init__(self, quick: bool, keep: Path | None) -> None:
        import planish

        self.path = assets.minilm_onnx()
        self.keep = keep
        self.sentences = assets.sentences("judge", QUICK_JUDGED if quick else JUDGED)
        count = CALIBRATION_SENTENCES
        self.calibration = {"wikipedia": encoder.calibration(count), "random": encoder.bad_calibration(count)}
        self.graph, _ = planish.Pipeline("raise").run(planish.capture(self.path), validate=False)
        self.weights = linear_weights(self.graph)
        self._stats: dict[str, Stats] = {}
        run = encoder.ort_runner(self.path)
        self.float_vectors = encoder.embeddings(run, self.sentences)
        self.float = Judged(1.0, 1.0, encoder.spearman(run), retrieval(run))

    def batches(self, source: str) -> list[encoder.Inputs]:
        return self.calibration[source]

    def stats(self, source: str) -> Stats:
        """Statistics of the raised graph on a calibration set, collected once."""
        import planish

        if source not in self._stats:
            start = time.perf_counter()
            self._stats[source] = planish.collect(self.graph, self.batches(source), row_mask="attention_mask")
            note(f"minilm: statistics, {source}, {time.perf_counter() - start:.0f} s")
        return self._stats[source]

    def judge(self, run: Run, short: bool = False) -> Judged:
        """Judge a model by the hidden states [batch, length, 384] that it gives; `short`: by the cosine alone."""
        sentences = self.sentences[::5] if short else self.sentences
        reference = self.float_vectors[::5] if short else self.float_vectors
        cosine = (encoder.embeddings(run, sentences) * reference).sum(1)
        if short:
            return Judged(float(cosine.mean()), float(cosine.min()), float("nan"), float("nan"))
        return Judged(float(cosine.mean()), float(cosine.min()), encoder.spearman(run), retrieval(run))

    def judge_graph(self, graph: Graph, short: bool = False) -> Judged:
        """Judge a quantised graph, evaluated in float32 with its explicit quantise and dequantise nodes."""
        return self.judge(graph_runner(graph), short)


def graph_runner(graph: Graph) -> Run:
    """A function from inputs to the first output, by planish's evaluator in float32."""
    import torch

    from planish.ir.evaluator import Evaluator

    evaluator, wanted = Evaluator(graph, torch.float32), graph.outputs[0][0]
    names = {v.name for v in graph.inputs}

    def run(inputs: encoder.Inputs) -> np.ndarray:
        with torch.no_grad():
            made = evaluator.run({name: value for name, value in inputs.items() if name in names})
        return made[wanted].numpy()  # type: ignore[no-any-return]

    return run


def retrieval(run: Run) -> float:
    """Mean reciprocal rank of the definition that belongs to an example sentence, WordNet's nouns."""
    pairs = assets.wordnet_examples(EXAMPLES)
    definitions = encoder.embeddings(run, [definition for definition, _ in pairs])
    examples = encoder.embeddings(run, [example for _, example in pairs])
    scores = examples @ definitions.T
    own = np.diagonal(scores)[:, None]
    return float((1.0 / (1 + (scores > own).sum(1))).mean())


def linear_weights(graph: Graph) -> int:
    """The number of weights of linears."""
    seen = {n.operands[1] for n in graph.nodes if n.op.name == "linear" and n.operands[1] is not None}
    return sum(v.constant.size for v in seen if v.constant is not None)
