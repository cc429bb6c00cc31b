"""Number formats of quantised tensors, as text and as data.

    name[:granularity][:rule][:scale dtype][:splitK][:static]

    int4:g64    uint8:tensor:static    int8:token    e4m3:channel    mxfp4:even    nvfp4    uint2:g64:split3

`name` says what an element is: `int2 int3 int4 int8` are symmetric, `uint2 uint3 uint4 uint8` have an integer
zero point, `e4m3 e5m2 e3m2 e2m3 e2m1` are floats; `mxfp4 mxfp6 mxfp6-e2m3 mxfp8 mxfp8-e5m2 mxint8` are the OCP
microscaling formats (32 elements, a scale that is a power of two), `nvfp4` has 16 elements, an e4m3 scale and
one scale for the tensor.

`granularity` says who shares a scale: `tensor`, `channel` (a row of a weight), `token` (a row of an activation),
`gN` (N consecutive elements along the last axis). `rule` says how a scale follows from a block:

    max       amax / (2^(b-1) - 1); for floats amax / largest element
    half      amax / ((2^b - 1) / 2), codes down to -2^(b-1)           (compressed-tensors)
    extreme   the element of largest magnitude / -2^(b-1)               (onnxruntime)
    floor     2^(floor(log2 amax) - emax)       ceil    one more if amax is no power of two
    even      amax rounded to the element's mantissa first              rceil   2^ceil(log2(amax / largest element))

`splitK`: every element belongs to one of K clusters, each with a scale and a zero point (SplitQuant, arXiv
2501.12428). `static`: the range of an activation comes from calibration.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from planish.ir.errors import PlanishError, nearest
from planish.ir.types import bits as dtype_bits
from planish.ir.types import is_float

Granularity = Literal["tensor", "channel", "token", "group"]
INTEGER_RULES = ("max", "half", "extreme")
POWER_RULES = ("floor", "ceil", "even", "rceil")
SCALE_DTYPES = ("f32", "f16", "bf16")
LARGEST_BLOCK = 2**20

# element: (largest magnitude, mantissa bits, least exponent of a normal number, exponent of the largest)
FLOATS: dict[str, tuple[float, int, int, int]] = {
    "f8e4m3fn": (448.0, 3, -6, 8),
    "f8e5m2": (57344.0, 2, -14, 15),
    "f6e3m2": (28.0, 2, -2, 4),
    "f6e2m3": (7.5, 3, 0, 2),
    "f4e2m1": (6.0, 1, 0, 2),
}
_ELEMENTS = {f"int{n}": f"i{n}" for n in (2, 3, 4, 8)} | {f"uint{n}": f"u{n}" for n in (2, 3, 4, 8)}
_ELEMENTS |= {"e4m3": "f8e4m3fn", "e5m2": "f8e5m2", "e3m2": "f6e3m2", "e2m3": "f6e2m3", "e2m1": "f4e2m1"}
# name: (element, block, dtype of the scale, rule)
_BLOCK_FORMATS = {
    "mxfp4": ("f4e2m1", 32, "f8e8m0", "floor"),
    "mxfp6": ("f6e3m2", 32, "f8e8m0", "floor"),
    "mxfp6-e2m3": ("f6e2m3", 32, "f8e8m0", "floor"),
    "mxfp8": ("f8e4m3fn", 32, "f8e8m0", "floor"),
    "mxfp8-e5m2": ("f8e5m2", 32, "f8e8m0", "floor"),
    "mxint8": ("i8", 32, "f8e8m0", "floor"),
    "nvfp4": ("f4e2m1", 16, "f8e4m3fn", "max"),
}
NAMES = (*_ELEMENTS, *_BLOCK_FORMATS)


@dataclass(frozen=True)
class Format:
    """The number format of a tensor.

    Attributes:
        element: the IR dtype of the codes.
        granularity: who shares a scale.
        block: elements along the last axis that share one, if the granularity is `group`.
        scale: the dtype to which scales are rounded; f8e8m0 are powers of two, f8e4m3fn stand beside one scale
            for the whole tensor.
        rule: how a scale follows from the elements of its block.
        clusters: scales of each block; an element says which is its own.
        static: the range of an activation comes from calibration.
    """

    element: str
    granularity: Granularity
    block: int | None = None
    scale: str = "f32"
    rule: str = "max"
    clusters: int = 1
    static: bool = False

    @staticmethod
    def parse(text: str, default: Granularity = "channel") -> Format:
        """The format of a text.

        Args:
            default: the granularity where the text names none.

        Raises:
            PlanishError: an unknown name or suffix, or suffixes that do not go together.
        """
        name, *suffixes = str(text).strip().split(":")
        if name in _BLOCK_FORMATS:
            element, block, scale, rule = _BLOCK_FORMATS[name]
            found = Format(element, "group", block, scale, rule)
        elif name in _ELEMENTS:
            found = Format(_ELEMENTS[name], default)
        else:
            raise PlanishError(f"format '{text}': '{name}' is unknown; expected one of {', '.join(NAMES)}",
                               hint=nearest(name, NAMES))  # fmt: skip
        said: set[str] = set()
        for suffix in suffixes:
            change = found._suffix(suffix, str(text), name in _BLOCK_FORMATS)
            if said & set(change):
                raise PlanishError(f"format '{text}': '{suffix}' contradicts an earlier suffix")
            said |= set(change)
            found = dataclasses.replace(found, **change)
        return found

    def _suffix(self, suffix: str, text: str, fixed: bool) -> dict[str, Any]:
        def refused(why: str) -> PlanishError:
            return PlanishError(f"format '{text}': '{suffix}' {why}")

        rules = POWER_RULES if self.scale == "f8e8m0" else INTEGER_RULES if not is_float(self.element) else ("max",)
        if suffix in ("tensor", "channel", "token") or re.fullmatch(r"g[0-9]+", suffix):
            if fixed:
                raise refused(f"does not fit: its blocks have {self.block} elements")
            if suffix[0] != "g":
                return {"granularity": suffix, "block": None}
            if not 2 <= int(suffix[1:]) <= LARGEST_BLOCK:
                raise refused(f"is no group; expected 2 to {LARGEST_BLOCK} elements")
            return {"granularity": "group", "block": int(suffix[1:])}
        if suffix in SCALE_DTYPES:
            if fixed:
                raise refused(f"does not fit: its scales are {self.scale}")
            return {"scale": suffix}
        if suffix in (*INTEGER_RULES, *POWER_RULES):
            if suffix not in rules:
                raise refused(f"does not fit; expected one of {', '.join(rules)}")
            if not self.symmetric and suffix != "max":
                raise refused("does not fit: the range of an unsigned format has two ends")
            return {"rule": suffix}
        if re.fullmatch(r"split[0-9]+", suffix):
            if fixed or is_float(self.element):
                raise refused("does not fit: clusters have integer codes and scales of their own")
            if not 2 <= int(suffix[5:]) <= 4:
                raise refused("has no form; expected 2 to 4 clusters")
            return {"clusters": int(suffix[5:])}
        if suffix == "static":
            return {"static": True}
        known = ("tensor", "channel", "token", "g64", *rules, *SCALE_DTYPES, "split3", "static")
        raise PlanishError(
            f"format '{text}': suffix '{suffix}' is unknown; expected one of {', '.join(known)}",
            hint=nearest(suffix, known),
        )

    def __str__(self) -> str:
        name, rule, parts = self.name, "max", []
        if name in _BLOCK_FORMATS:
            rule = _BLOCK_FORMATS[name][3]
        else:
            parts.append(f"g{self.block}" if self.granularity == "group" else self.granularity)
        if self.rule != rule:
            parts.append(self.rule)
        if name not in _BLOCK_FORMATS and self.scale != "f32":
            parts.append(self.scale)
        if self.clusters > 1:
            parts.append(f"split{self.clusters}")
        if self.static:
            parts.append("static")
        return ":".join([name, *parts])

    @cached_property
    def name(self) -> str:
        """The first word of its text."""
        for name, (element, block, scale, _) in _BLOCK_FORMATS.items():
            if (element, block, scale) == (self.element, self.block, self.scale):
                return name
        return next(name for name, element in _ELEMENTS.items() if element == self.element)

    @property
    def symmetric(self) -> bool:
        """True if it has no zero point."""
        return not self.element.startswith("u")

    @property
    def is_float(self) -> bool:
        """True if its elements are floats."""
        return is_float(self.element)

    @property
    def element_bits(self) -> int:
        """Bits of one code, without scales."""
        return dtype_bits(self.element)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest code (for floats: element). Symmetric integers under rule `max`, and mxint8,
        do not use the least code of all."""
        if self.is_float:
            most = FLOATS[self.element][0]
            return -most, most
        n = self.element_bits
        if not self.symmetric:
            return 0.0, float(2**n - 1)
        lowest = -(2 ** (n - 1)) + (self.rule not in ("half", "extreme"))
        return float(lowest), float(2 ** (n - 1) - 1)
