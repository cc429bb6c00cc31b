"""The rows of `bench/accuracy.py`: recipes in the formats that the issue asks for, what is left out of each, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: short name.
        model: "gemma" or "minilm".
        recipe: the recipe whose pipeline runs.
        options: of its passes, what is other than in the recipe: pass name -> option -> value.
        bound: of the perplexity ratio (at most) or the mean cosine (at least); None: no target.
        without: labels of what is left out in turn: a pass name, or `gptq`, `quantised inputs`, `clip`.
    """

    key: str
    model: str
    recipe: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    bound: float | None = None
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model} {self.key}"

    def passes(self, left_out: str | None = None) -> list[Any]:
        """The passes of the row, one of them (or one option) left out."""
        from planish.integrate.recipes import load_recipe

        found = list(load_recipe(self.recipe).passes().passes)
        made = [replace(p, **self.options[p.name]) if p.name in self.options else p for p in found]
        return made if left_out is None else leave_out(made, left_out)


PLAINER: dict[str, dict[str, Any]] = {
    "gptq": {"solver": "rtn", "inputs": "float"},
    "quantised inputs": {"inputs": "float"},
    "range mse": {"static_range": "min-max"},
}


def leave_out(passes: Sequence[Any], what: str) -> list[Any]:
    """The same passes without one of that name, or with `quantize` plainer by one option."""
    if what in PLAINER:
        return [replace(p, **PLAINER[what]) if p.name == "quantize" else p for p in passes]
    left = [p for p in passes if p.name != what]
    if len(left) == len(passes):
        raise ValueError(f"no pass '{what}' in {[p.name for p in passes]}")
    if what == "split-layers":
        left = [
            replace(p, weights=":".join(w for w in p.weights.split(":") if not w.startswith("split")))
            if p.name == "quantize"
            else p
            for p in left
        ]
    return left


def quantise(**options: Any) -> dict[str, dict[str, Any]]:
    return {"quantize": options}


FLOAT_EMBEDDING = {"embeddings": "none"}  # Gemma's is the head too; peers leave it in float as well


def in_groups(size: int) -> dict[str, dict[str, Any]]:
    """4-bit weights in groups of another size than the recipe's."""
    form = f"uint4:g{size}"
    return {"scale-channels": {"weights": form}, "quantize": {"weights": form, **FLOAT_EMBEDDING}}


ROTATIONS = ("scale-channels", "insert-hadamard", "gptq")
GEMMA = [
    Row("w8a8-static", "gemma", "w8a8-static-hadamard", quantise(**FLOAT_EMBEDDING), 1.03, ROTATIONS),
    Row("w8a8-token", "gemma", "w8a8-token-hadamard", quantise(**FLOAT_EMBEDDING), 1.005, ROTATIONS),
    Row("w4a16-g128", "gemma", "w4a16", in_groups(128), 1.12, ("scale-channels", "gptq", "quantised inputs")),
    Row("w4a8-g128", "gemma", "w4a8", in_groups(128), 1.15, ("scale-channels", "gptq", "quantised inputs")),
    Row(
        "w4a4-g64-r32",
        "gemma",
        "w4a4",
        quantise(**FLOAT_EMBEDDING),
        1.6,
        ("insert-hadamard", "extract-low-rank", "gptq"),
    ),
    Row("w2a16-g64-split", "gemma", "w2a16", quantise(**FLOAT_EMBEDDING), 3.0, ("split-layers", "gptq")),
]
MINILM = [
    Row("w4a16-g32", "minilm", "w4a16", {}, 0.99, ("scale-channels", "gptq", "quantised inputs")),
    Row("w4a8-g32", "minilm", "w4a8", {}, 0.985, ("scale-channels", "gptq")),
    Row("w4a4-g64-r32", "minilm", "w4a4", {}, 0.97, ("insert-hadamard", "extract-low-rank", "gptq")),
]
