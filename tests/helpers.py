"""What many tests need: the text round trip, random inputs, the relative error."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from planish.ir import probe
from planish.ir.graph import Graph
from planish.ir.probe import relative_error
from planish.ir.text import difference, parse, render

__all__ = ["ACTIVATIONS", "check_text", "random_inputs", "relative_error"]

# the 8-bit forms of activations by how their range is taken; `floors`: per row, with what statistics tell of the sign
ACTIVATIONS = {
    "dynamic": "uint8:tensor",
    "token": "int8:token",
    "floors": "int8:token",
    "static": "uint8:tensor:static",
    "none": "none",
}


def check_text(graph: Graph) -> None:
    """parse(print(g)) == g, and prints the same again."""
    text, constants = render(graph)
    again = parse(text, constants)
    assert difference(graph, again) is None, difference(graph, again)
    assert render(again)[0] == text
    assert text.isascii()


def random_inputs(graph: Graph, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Inputs with zeros and large values planted; `sizes` gives the symbolic dims."""
    return probe.random_inputs(graph, seed, sizes=sizes)
