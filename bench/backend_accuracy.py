"""What the backend computes beside the evaluator's quantised graph, and beside float.

    python bench/backend_accuracy.py [--quick] [--json FILE] [--only NAME ...]

The same recipe twice: compiled by the backend, and each of Dynamo's graphs captured, rewritten by the same passes and
evaluated by planish in float32 with its explicit quantise and dequantise nodes.

- Ops: every kernel of the graph beside the evaluator, on what the kernels before it gave (`bench/backend_ops.py`):
  floats within `FLOATS` of the largest of their row, attention within its bound (it rounds to bf16 where activations
  are quantised, 2^-9 at each of four places), codes of activations the same or next to each other, `CODES` of them.
- The whole: without quantised activations the outputs are equal (`WEIGHT_ONLY`). With them two right programs drift
  apart, as roundings near a tie go either way, but their distance from float is the same (`DISTANCE`).
- MiniLM, W8A8: cosine of embeddings to float's, equal to 3 digits.
- Gemma 3 270M on windows of Brown. 4-bit weights: perplexity equal to 3 digits, and the same tokens. W8A8: equal within
  what chance makes of it, `DRIFT`: noise of 1e-6 of attention's results moves two windows by up to 1.5 % (standard
  deviation .7 %) and twelve by .1 % (all kinds of noise, and other roundings: .2 %).
- Ten models of the zoo, 4-bit weights and W8A8.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import assets
import backend_models as models
import numpy as np
from backend_ops import Evaluated
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    import torch

W8A8 = "raise,quantize{weights=int8:channel activations=int8:token embeddings=none}"
W4A16 = "raise,quantize{weights=int4:g32 embeddings=none}"
WEIGHT_ONLY = 1e-4  # of the largest output: nothing is rounded at run time
DISTANCE = 1.25  # of the evaluator's distance from float
FLOATS = 1e-4  # of the largest of a row: float32 sums of up to 2048 products in another order
CODES = 0.02  # of all codes: those that lie next to a tie
PERPLEXITY = 5e-4  # equal to 3 digits
DRIFT = 0.03  # of a perplexity on one window where activations are quantised: three standard deviations
TOKENS = 1e-3  # of the likeliest next tokens: those that are another, where no activation is quantised
ZOO = ("llama", "gemma3", "qwen3", "gpt2", "bert", "modernbert", "vit", "opt", "phi3", "t5")
SENTENCES, QUICK_SENTENCES, WINDOWS, QUICK_WINDOWS = 96, 16, 8, 2


def three(
    module: torch.nn.Module, recipe: str, dynamic: bool = False
) -> tuple[Evaluated, dict[str, Callable[..., Any]]]:
    """The module in float, through the backend, and through the evaluator."""
    import torch

    options = {"recipe": recipe, "strict": True}
    evaluated = Evaluated(options, compared=True)
    return evaluated, {
        "float": module,
        "backend": torch.compile(module, backend="planish", dynamic=dynamic, options=options),
        "evaluator": torch.compile(module, backend=evaluated, dynamic=dynamic),
    }


def of_ops(evaluated: Evaluated) -> dict[str, float]:
    """Figures of the comparison op by op."""
    ops = evaluated.ops
    return {
        "kernels": ops.kernels,
        "attentions": ops.attentions,
        "floats": ops.floats,
        "attention": ops.attention,
        "codes": ops.share,
        "far": ops.far,
    }


def minilm(quick: bool) -> dict[str, Any]:
    """Embeddings of sentences of Brown, by the default recipe of the backend, calibrated."""
    import torch

    import planish

    texts = assets.sentences("judge", QUICK_SENTENCES if quick else SENTENCES)
    learnt = assets.sentences("calibration", 32)
    vectors: dict[str, np.ndarray] = {}
    evaluated, runs = three(models.minilm().requires_grad_(False), "w8a8-token", dynamic=True)
    with torch.no_grad(), planish.calibrating(runs["backend"], row_mask="attention_mask"):
        for start in range(0, len(learnt), 8):
            runs["backend"](**_encoded(learnt[start : start + 8]))
    for name, run in runs.items():
        torch._dynamo.reset()
        rows = []
        for start in range(0, len(texts), 8):
            given = _encoded(texts[start : start + 8])
            mask = given["attention_mask"][..., None]
            with torch.no_grad():
                rows.append(((run(**given) * mask).sum(1) / mask.sum(1)).numpy())
        held = np.concatenate(rows)
        vectors[name] = held / np.linalg.norm(held, axis=1, keepdims=True)
        note(f"minilm: {name}")

    def cosine(a: str, b: str) -> float:
        return float((vectors[a] * vectors[b]).sum(1).mean())

    return {
        "backend": cosine("backend", "float"),
        "evaluator": cosine("evaluator", "float"),
        "to each other": cosine("backend", "evaluator"),
        **of_ops(evaluated),
    }


def _encoded(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    import torch

    return {k: torch.from_numpy(v) for k, v in assets.encode(list(texts)).items()}


def gemma3(quick: bool, recipe: str) -> dict[str, float]:
    """Perplexities on windows of Brown; the head, which is the embedding, stays in float."""
    import gemma
    import torch

    folder = assets.gemma_dir()
    windows = gemma.windows(folder, "brown", QUICK_WINDOWS if quick else WINDOWS)
    net = gemma.load(folder)
    found: dict[str, float] = {}
    tokens: dict[str, torch.Tensor] = {}
    evaluated, runs = three(net.model, recipe)
    for name, run in runs.items():
        torch._dynamo.reset()
        likeliest: list[torch.Tensor] = []

        def logits(
            ids: torch.Tensor, run: Callable[..., Any] = run, likeliest: list[torch.Tensor] = likeliest
        ) -> torch.Tensor:
            made: torch.Tensor = net.lm_head(run(input_ids=ids, use_cache=False).last_hidden_state)
            likeliest.append(made.argmax(-1))
            return made

        with torch.no_grad():
            found[name] = gemma.perplexity(logits, windows)
        tokens[name] = torch.cat(likeliest)
        note(f"gemma, {recipe}: {name} {found[name]:.4f}")
    other = float((tokens["backend"] != tokens["evaluator"]).double().mean())
    return {**found, "windows": len(windows), "other tokens": other, **of_ops(evaluated)}


def zoo_model(name: str, recipe: str) -> dict[str, float]:
    """How far backend and evaluator are from float and from each other, of the largest output."""
    import torch
    import zoo_models

    module, given = zoo_models.build(name)
    outputs: dict[str, list[torch.Tensor]] = {}
    evaluated, runs = three(module.float().eval().requires_grad_(False), recipe)
    for kind, run in runs.items():
        torch._dynamo.reset()
        with torch.no_grad():
            made = run(**given)
        leaves = torch.utils._pytree.tree_leaves(made.to_tuple() if hasattr(made, "to_tuple") else made)
        outputs[kind] = [t.double() for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not evaluated.graphs:
        raise RuntimeError(f"zoo {name}: no graph was quantised")
    return {
        "backend": _distance(outputs["backend"], outputs["float"]),
        "evaluator": _distance(outputs["evaluator"], outputs["float"]),
        "to each other": zoo_models.largest_difference(outputs["backend"], outputs["evaluator"]),
        **of_ops(evaluated),
    }


def _distance(made: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The norm of the difference of all outputs, over the norm of those expected."""
    import torch

    pairs = [(a.flatten(), b.flatten()) for a, b in zip(made, expected, strict=True)]
    one, two = (torch.cat([pair[i][torch.isfinite(pair[1])] for pair in pairs]) for i in range(2))
    return float((one - two).norm() / two.norm())


def measure(quick: bool, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures by name."""
    warnings.simplefilter("ignore")
    jobs: dict[str, Callable[[], dict[str, Any]]] = {"minilm w8a8": lambda: minilm(quick)}
    for label, recipe in (("w4a16", W4A16), ("w8a8", W8A8)):
        jobs[f"gemma {label}"] = lambda recipe=recipe: gemma3(quick, recipe)  # type: ignore[misc]
        for name in ZOO[:3] if quick else ZOO:
            jobs[f"zoo {name} {label}"] = lambda name=name, recipe=recipe: zoo_model(name, recipe)  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        if not only or any(part in name for part in only):
            start = time.perf_counter()
            found[name] = job()
            figures = " ".join(f"{k} {v:.4g}" for k, v in found[name].items())
            note(f"{name}, {time.perf_counter() - start:.0f} s: {figures}")
    figures = [
        [name, *(f"{held[k]:.5g}" for k in ("backend", "evaluator"))]
        + [f"{held.get('to each other', held.get('other tokens')):.2g}", int(held["kernels"]), f"{held['floats']:.1g}"]
        + [f"{held['attention']:.1g}", f"{held['codes']:.2%}", int(held["far"])]
        for name, held in found.items()
    ]
    columns = ["model", "backend", "evaluator", "apart", "kernels", "floats", "attention", "codes", "far"]
    table("the backend beside the evaluator's quantised graph", columns, figures)
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    """What demand 9 asks for."""
    made = []
    for name, held in found.items():
        weights_only = "w4a16" in name
        made.append(Target(f"{name} floats of a kernel", held["floats"], FLOATS))
        made.append(Target(f"{name} attention, of its bound", held["attention"], 1))
        made.append(Target(f"{name} codes apart by", held["far"], 1))
        made.append(Target(f"{name} share of such codes", held["codes"], CODES))
        if name.startswith("gemma"):
            difference = abs(held["backend"] / held["evaluator"] - 1)
            bound = PERPLEXITY if weights_only else DRIFT / held["windows"] ** 0.5
            made.append(Target(f"{name} perplexity, relative", difference, bound))
            if weights_only:
                made.append(Target(f"{name} other tokens", held["other tokens"], TOKENS))
        elif name.startswith("minilm"):
            made.append(Target("minilm cosines apart by", abs(held["backend"] - held["evaluator"]), PERPLEXITY))
        elif weights_only:
            made.append(Target(f"{name} error", held["to each other"], WEIGHT_ONLY))
        else:
            made.append(Target(f"{name} error, of the evaluator's", held["backend"] / held["evaluator"], DISTANCE))
    return made


def main() -> int:
    options = arguments(__doc__.splitlines()[0], only={"nargs": "+", "metavar": "NAME"})
    found = measure(options.quick, options.only)
    return Outcome("backend_accuracy", found, targets(found)).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
