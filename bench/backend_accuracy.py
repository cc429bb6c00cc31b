"""What the backend computes beside the evaluator's quantised graph, and beside float.

    python bench/backend_accuracy.py [--quick] [--json FILE] [--only NAME ...]

The same recipe twice: compiled by the backend, and each of Dynamo's graphs captured, rewritten by the same passes and
evaluated by planish in float32 with its explicit quantise and dequantise nodes. Both round an activation to a code from
sums taken in another order, so a value near a tie may fall to the neighbouring code: a step of 1 / 127 of a row's range
in one of many terms. Stated for it: the largest difference relative to the largest output, `TOLERANCE`.

- MiniLM, W8A8: cosine of the two embeddings, and how far both are from float's.
- Gemma 3 270M, 4-bit weights and W8A8: perplexity of both on windows of Brown, equal to 3 digits.
- Ten models of the zoo, W8A8 and 4-bit weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import assets
import backend_models as models
import numpy as np
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    import torch
    from torch import fx

W8A8 = "raise,quantize{weights=int8:channel activations=int8:token embeddings=none}"
W4A16 = "raise,quantize{weights=int4:g32 embeddings=none}"
TOLERANCE = 0.02  # of the largest output: neighbouring codes of activations (8 bits) through a few layers
WEIGHT_ONLY = 1e-4  # nothing is rounded at run time
ZOO = ("llama", "gemma3", "qwen3", "gpt2", "bert", "modernbert", "vit", "opt", "phi3", "t5")
SENTENCES, QUICK_SENTENCES, WINDOWS, QUICK_WINDOWS = 96, 16, 8, 2


def evaluated(recipe: str) -> Callable[..., Any]:
    """A backend of torch.compile that evaluates each graph as the recipe's passes leave it."""
    import torch

    import planish
    from planish.capture.from_dynamo import DynamoGraph
    from planish.ir.evaluator import Evaluator

    def compile_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = DynamoGraph(module, inputs).capture(inputs, guard=False)
        graph, report = planish.Pipeline(recipe).run(captured.graph, validate=False)
        if not any(p.applied for p in report.passes if p.name == "quantize"):
            return module.forward
        quantised = Evaluator(graph, torch.float32)

        def run(*given: Any) -> Any:
            named = {n: torch.as_tensor(given[i]) for n, i in zip(captured.inputs, captured.given, strict=True)}
            with torch.no_grad():
                made = quantised.run(named)
            return tuple(made[name] for name, _ in graph.outputs)

        return run

    return compile_graph


def three(module: torch.nn.Module, recipe: str, dynamic: bool = False) -> dict[str, Callable[..., Any]]:
    """The module in float, through the backend, and through the evaluator."""
    import torch

    return {
        "float": module,
        "backend": torch.compile(
            module, backend="planish", dynamic=dynamic, options={"recipe": recipe, "strict": True}
        ),
        "evaluator": torch.compile(module, backend=evaluated(recipe), dynamic=dynamic),
    }


def minilm(quick: bool) -> dict[str, Any]:
    """Embeddings of sentences of Brown."""
    import torch

    texts = assets.sentences("judge", QUICK_SENTENCES if quick else SENTENCES)
    vectors: dict[str, np.ndarray] = {}
    for name, run in three(models.minilm().requires_grad_(False), W8A8).items():
        torch._dynamo.reset()
        rows = []
        for start in range(0, len(texts), 8):
            given = {k: torch.from_numpy(v) for k, v in assets.encode(texts[start : start + 8]).items()}
            mask = given["attention_mask"][..., None]
            with torch.no_grad():
                rows.append(((run(**given) * mask).sum(1) / mask.sum(1)).numpy())
        held = np.concatenate(rows)
        vectors[name] = held / np.linalg.norm(held, axis=1, keepdims=True)

    def cosine(a: str, b: str) -> float:
        return float((vectors[a] * vectors[b]).sum(1).mean())

    return {
        "backend to evaluator": cosine("backend", "evaluator"),
        "backend to float": cosine("backend", "float"),
        "evaluator to float": cosine("evaluator", "float"),
        "error": float(np.abs(vectors["backend"] - vectors["evaluator"]).max() / np.abs(vectors["evaluator"]).max()),
    }


def gemma3(quick: bool, recipe: str) -> dict[str, float]:
    """Perplexities on windows of Brown; the head, which is the embedding, stays in float."""
    import gemma
    import torch

    folder = assets.gemma_dir()
    tokens = gemma.windows(folder, "brown", QUICK_WINDOWS if quick else WINDOWS)
    net = gemma.load(folder)
    found = {}
    for name, run in three(net.model, recipe).items():
        torch._dynamo.reset()

        def logits(ids: torch.Tensor, run: Callable[..., Any] = run) -> torch.Tensor:
            return net.lm_head(run(input_ids=ids, use_cache=False).last_hidden_state)  # type: ignore[no-any-return]

        with torch.no_grad():
            found[name] = gemma.perplexity(logits, tokens)
        note(f"gemma, {recipe}: {name} {found[name]:.4f}")
    return found


def zoo_model(name: str, recipe: str) -> float:
    """The largest difference of the outputs of backend and evaluator, over the largest output."""
    import torch
    import zoo_models

    module, given = zoo_models.build(name)
    outputs: dict[str, list[torch.Tensor]] = {}
    for kind, run in three(module.float().eval().requires_grad_(False), recipe).items():
        torch._dynamo.reset()
        if kind == "float":
            continue
        with torch.no_grad():
            made = run(**given)
        leaves = torch.utils._pytree.tree_leaves(made.to_tuple() if hasattr(made, "to_tuple") else made)
        outputs[kind] = [t.double() for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return zoo_models.largest_difference(outputs["backend"], outputs["evaluator"])


def measure(quick: bool, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures by name."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    if wanted("minilm"):
        found["minilm w8a8"] = minilm(quick)
    for label, recipe in (("w4a16", W4A16), ("w8a8", W8A8)):
        if wanted(f"gemma {label}"):
            found[f"gemma {label}"] = gemma3(quick, recipe)
        for name in ZOO[:3] if quick else ZOO:
            if wanted(f"zoo {name}"):
                found[f"zoo {name} {label}"] = {"error": zoo_model(name, recipe)}
                note(f"zoo {name} {label}: {found[f'zoo {name} {label}']['error']:.2g}")
    rows = [[name, " ".join(f"{k} {v:.6g}" for k, v in held.items())] for name, held in found.items()]
    table("the backend beside the evaluator's quantised graph", ["model", "figures"], rows)
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    """What demand 9 asks for."""
    made = []
    for name, held in found.items():
        if name.startswith("gemma"):
            difference = abs(held["backend"] / held["evaluator"] - 1)
            made.append(Target(f"{name} perplexity, relative", difference, 5e-4))
        elif name.startswith("minilm"):
            made.append(Target("minilm cosine to the evaluator's", held["backend to evaluator"], 0.9999, at_most=False))
        else:
            made.append(Target(f"{name} error", held["error"], WEIGHT_ONLY if "w4a16" in name else TOLERANCE))
    return made


def main() -> int:
    options = arguments(__doc__.splitlines()[0], only={"nargs": "+", "metavar": "NAME"})
    found = measure(options.quick, options.only)
    return Outcome("backend_accuracy", found, targets(found)).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
