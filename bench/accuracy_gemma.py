"""Gemma 3 270M under quantisation: perplexity on Brown over that of float, KL divergence from the float logits.

The graph is captured once, raised, and cut before the head: the head is the embedding (tied), which stays in float in
every row, planish's and the peers', and what is judged is the hidden state that a quantised model gives to it. So the
float logits and those of every row come from one product with the same float32 matrix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import assets
import gemma
from common import note

if TYPE_CHECKING:
    import torch

    from planish import Graph, Stats

LENGTH, CHUNK = gemma.LENGTH, 128
WINDOWS, QUICK_WINDOWS = 40, 4  # of 512 tokens: 40 are 20,440 predicted tokens
KL_WINDOWS, SHORT_WINDOWS = 4, 8  # for the divergence; for ablations
CALIBRATION_WINDOWS, SAMPLED = 32, 512  # rows that statistics keep of each value
SEED = 0
Hidden = Callable[["torch.Tensor"], "torch.Tensor"]


def random_windows(count: int, vocabulary: int) -> torch.Tensor:
    """Windows of BOS and random tokens: bad calibration on purpose."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(4, vocabulary, (count, LENGTH), generator=generator)
    tokens[:, 0] = gemma.BOS
    return tokens


def cut_before_head(graph: Graph, vocabulary: int) -> None:
    """Make what the head reads the only output."""
    from planish.ir.rewriter import Rewriter

    heads = [n for n in graph.nodes if n.op.name == "linear" and n.result.shape and n.result.shape[-1] == vocabulary]
    if len(heads) != 1 or heads[0].operands[0] is None:
        raise RuntimeError(f"expected one linear to {vocabulary} outputs; got {len(heads)}")
    with Rewriter(graph) as rewriter:
        graph.outputs = [("hidden", heads[0].operands[0])]
        rewriter.sweep()
    for key in ("torch.out_spec", "torch.outputs", "torch.out_classes"):  # of the structure that the module returned
        graph.meta.pop(key, None)


@dataclass
class Judged:
    """What a quantised model loses.

    Attributes:
        perplexity: on the Brown windows.
        ratio: to that of float on the same windows.
        kl: mean divergence of its next-token distribution from float's, nats a token.
        tokens: predicted.
    """

    perplexity: float
    ratio: float
    kl: float
    tokens: int


class Gemma:
    """The model, its calibration data, and the float run that all is compared with.

    Args:
        quick: judge on fewer windows.
        keep: a folder for the raised graph and the statistics, read if they are there.
    """

    def __init__(self, quick: bool, keep: Path | None) -> None:
        import torch

        self.folder = assets.gemma_dir()
        self.keep = keep
        self.tokens = gemma.windows(self.folder, "brown", WINDOWS)
        if quick:
            self.tokens = self.tokens[:: WINDOWS // QUICK_WINDOWS][:QUICK_WINDOWS]
        # for ablations: spread over the corpus
        self.short = list(range(0, len(self.tokens), max(1, len(self.tokens) // SHORT_WINDOWS)))[:SHORT_WINDOWS]
        model = gemma.load(self.folder)
        self.head = model.get_output_embeddings().weight.detach()
        self.vocabulary = len(self.head)
        self.calibration = {
            "wikipedia": gemma.windows(self.folder, "wikipedia", CALIBRATION_WINDOWS),
            "random": random_windows(CALIBRATION_WINDOWS, self.vocabulary),
        }
        self.graph = self._captured(model)
        self.weights = sum(w.numel() for n, w in model.model.layers.named_parameters() if w.dim() == 2)
        start = time.perf_counter()
        with torch.no_grad():
            hidden = [model.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in self.tokens]
        self.float_hidden = torch.stack(hidden)
        self.float_losses = torch.tensor([self._loss(h, row) for h, row in zip(hidden, self.tokens, strict=True)])
        seconds = time.perf_counter() - start
        note(f"gemma: float, perplexity {self.perplexity(range(len(self.tokens))):.3f}, {seconds:.0f} s")
        self._stats: dict[str, Stats] = {}

    def perplexity(self, rows: Sequence[int]) -> float:
        """Of the float model on some windows."""
        return math.exp(float(self.float_losses[list(rows)].sum()) / (len(rows) * (LENGTH - 1)))

    def batches(self, source: str) -> list[dict[str, Any]]:
        """Calibration data: batches of two windows."""
        return [{"input_ids": part.numpy()} for part in self.calibration[source].split(2)]

    def stats(self, source: str) -> Stats:
        """Statistics of the raised graph on a calibration set, collected once."""
        import planish
        from planish.ir.stats import Stats

        if source not in self._stats:
            count = len(self.calibration[source])
            path = None if self.keep is None else self.keep / f"gemma-{source}-{count}-{SAMPLED}.stats"
            if path is not None and path.exists():
                self._stats[source] = Stats.load(path)
            else:
                start = time.perf_counter()
                self._stats[source] = planish.collect(self.graph, self.batches(source), rows=SAMPLED)
                note(f"gemma: statistics of {count} windows, {source}, {time.perf_counter() - start:.0f} s")
                if path is not None:
                    self._stats[source].save(path)
        return self._stats[source]

    def judge(self, hidden: Hidden, rows: Sequence[int] | None = None) -> Judged:
        """Judge a model by the hidden states that it gives the head.

        Args:
            hidden: from tokens [1, 512] to the state [1, 512, 640] behind the last norm.
            rows: windows; all without.
        """
        import torch

        rows = list(range(len(self.tokens)) if rows is None else rows)
        loss = divergence = 0.0
        compared = rows[:: max(1, len(rows) // KL_WINDOWS)][:KL_WINDOWS]
        with torch.no_grad():
            for row in rows:
                state = hidden(self.tokens[row][None])[0].float()
                loss += self._loss(state, self.tokens[row])
                if row in compared:
                    divergence += self._divergence(state, self.float_hidden[row])
        perplexity = math.exp(loss / (len(rows) * (LENGTH - 1)))
        tokens = len(rows) * (LENGTH - 1)
        return Judged(perplexity, perplexity / self.perplexity(rows), divergence / (len(compared) * LENGTH), tokens)

    def judge_graph(self, graph: Graph, rows: Sequence[int] | None = None) -> Judged:
        """Judge a quantised graph, run by torch in float32 with its explicit quantise and dequantise nodes."""
        import planish

        module = planish.to_torch(graph)

        def hidden(tokens: torch.Tensor) -> torch.Tensor:
            return module(input_ids=tokens, use_cache=False)  # type: ignore[no-any-return]

        return self.judge(hidden, rows)

    def _captured(self, model: torch.nn.Module) -> Graph:
        import planish
        from planish.ir.store import load, save

        path = None if self.keep is None else self.keep / "gemma-raised.planish"
        if path is not None and path.exists():
            return load(path)
        start = time.perf_counter()
        graph = gemma.captured(model, self.tokens[:2, :64].contiguous())
        graph, _ = planish.Pipeline("raise").run(graph, validate=False)
        cut_before_head(graph, self.vocabulary)
        note(f"gemma: captured and raised, {time.perf_counter() - start:.0f} s")
        if path is not None:
            save(graph, path)
        return graph

    def _logits(self, state: torch.Tensor, start: int) -> torch.Tensor:
        return state[start : start + CHUNK] @ self.head.T

    def _loss(self, state: torch.Tensor, tokens: torch.Tensor) -> float:
        """Sum of the negative log-likelihoods of the tokens behind the first."""
        import torch

        total, following = 0.0, tokens[1:]
        for start in range(0, LENGTH - 1, CHUNK):
            wanted = following[start : start + CHUNK]
            logits = self._logits(state, start)[: len(wanted)]
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        return total

    def _divergence(self, state: torch.Tensor, reference: torch.Tensor) -> float:
        """Sum over positions of KL(float || quantised)."""
        import torch

        total = 0.0
        for start in range(0, LENGTH, CHUNK):
            p = self._logits(reference, start).log_softmax(-1)
            q = self._logits(state, start).log_softmax(-1)
            total += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        return total


def bits_per_weight(graph: Graph, weights: int) -> float:
    """Bits that a graph spends on what were `weights` weights: codes, scales, zero points, cluster ids, float branches.

    Every float (scales, float zero points, branches, outlier columns) counts 16 bits, as the peers' do.
    """
    from planish.ir.qnodes import weight_of
    from planish.ir.types import bits

    total, seen = 0.0, set()
    for node in graph.nodes:
        weight = node.operand(1)
        if node.op.name not in ("linear", "gemm", "matmul") or weight is None or weight in seen:
            continue
        seen.add(weight)
        q = weight_of(node)
        if q is not None:
            shorter = 0 if q.scale_dtype.startswith("f8") else bits(q.scale_dtype) - 16
            floats = q.scale.size + (q.zero.size if q.zero is not None and q.zero_is_float else 0)
            total += q.bits * q.codes.size - shorter * floats
        elif weight.constant is not None:
            total += 16.0 * weight.constant.size
    return total / weights
