"""Random pipelines of exact passes, in any order that the manager accepts."""

from __future__ import annotations

import random

from planish.ir.errors import PlanishError
from planish.passes.manager import Pipeline

# every exact pass, with options that reach each of its methods
EXACT = (
    "fold-constants",
    "merge-linears",
    "fold-batch-norm",
    "fold-norm-gain",
    "fold-norm-gain{untie=true}",
    "fold-gates",
    "center-layer-norm",
    "center-layer-norm{untie=true}",
    "shift-channels",
    "scale-channels",
    "scale-channels{method=smoothquant alpha=0.7}",
    "scale-channels{method=smoothquant insert=true}",
    "scale-channels{method=balance}",
    "scale-channels{method=os-plus}",
    "scale-channels{method=awq}",
    "extract-low-rank{rank=2 iterations=3 grid=4}",
    "extract-low-rank{rank=1 fold=true iterations=2 grid=3}",
    "extract-low-rank{rank=2 smooth=false activations=none weights=nvfp4 shift=none}",
    "isolate-outliers",
    "split-layers",
    "split-layers{form=layers scope=row activations=true}",
    "split-layers{clusters=2 scope=g4}",
    "extract-outliers",
    "extract-outliers{fraction=0.25}",
    "extract-outliers{mode=dynamic threshold=2.0}",
    "disassemble-channels",
    "disassemble-channels{ratio=0.5}",
    "reparameterize-norm",
    "reparameterize-norm{center=mean}",
    "permute-channels{method=sort}",
    "permute-channels{method=zigzag group=8}",
    "permute-channels{method=k-sort}",
    "permute-channels{method=k-sort group=2 tables=head}",
    "permute-channels{method=group-by-range group=4}",
    "rotate-channels{kind=hadamard space=value}",
    "rotate-channels{kind=random space=all}",
    "rotate-channels{kind=klt-hadamard space=all}",
    "rotate-channels{kind=hadamard space=residual}",
    "transform-channels{kind=invertible}",
    "transform-channels{kind=kronecker}",
    "transform-channels{kind=block}",
    "insert-hadamard{sites=down}",
    "insert-hadamard{sites=qk}",
    "insert-hadamard{sites=all}",
    "merge-hadamards",
)


def draw(rng: random.Random, longest: int = 7) -> str:
    """The text of a random pipeline that the manager accepts."""
    while True:
        chosen = [rng.choice(EXACT) for _ in range(rng.randint(2, longest))]
        text = ",".join(chosen)
        try:
            Pipeline(text)
        except PlanishError as refusal:
            if ": needs '" not in str(refusal):  # anything else is no matter of order
                raise
            continue
        return text
