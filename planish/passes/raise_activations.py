"""Raise activations that are written as arithmetic.

    gelu(x)          =  x (1 + erf(x / sqrt 2)) / 2
    gelu_tanh(x)     =  x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    silu(x)          =  x sigmoid(x)
    hard_swish(x)    =  x hard_sigmoid(x; 1/6, 1/2)  =  x clip(x + 3, 0, 6) / 6

Exact over the reals. The match starts at e = erf, tanh, sigmoid, ... (x) and reads the argument as a
polynomial in x and what follows as a polynomial in x and e: every association, commutation and
spelling of the constants (a division or a multiplication, a power or products) is one pattern.
Constants must be the numbers above to 1e-12; a float32 constant is a rounding of them, and
`name-constants`, which runs before this in `raise`, restores it.
Gelu: arXiv:1606.08415. SiLU: arXiv:1702.03118. Hard swish: arXiv:1905.02244.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.base import Exactness
from planish.passes.match import PatternPass, Rule, Site, Trail, attribute, only_reader, origin, scalar

Polynomial = dict[tuple[int, ...], float]  # powers of the atoms: coefficient

# how far a constant may be from its number to be taken for a rounding of it, relative
LOOSE = {"f64": 1e-6, "f32": 1e-6, "f16": 2.0**-10, "bf16": 2.0**-7}
TIGHT = 1e-12
SQRT_HALF, SQRT_2_PI, CUBIC = math.sqrt(0.5), math.sqrt(2.0 / math.pi), 0.044715
DEGREE = 4
DEPTH = 12

# e = op(argument); result, both as polynomials in (x, e)
FORMS: Mapping[str, tuple[str, Polynomial, Polynomial, str]] = {
    "gelu": ("erf", {(1, 0): SQRT_HALF}, {(1, 0): 0.5, (1, 1): 0.5}, "gelu"),
    "gelu-tanh": ("tanh", {(1, 0): SQRT_2_PI, (3, 0): SQRT_2_PI * CUBIC}, {(1, 0): 0.5, (1, 1): 0.5}, "gelu"),
    "silu": ("sigmoid", {(1, 0): 1.0}, {(1, 1): 1.0}, "silu"),
    "hard-swish": ("hard_sigmoid", {(1, 0): 1.0}, {(1, 1): 1.0}, "hard_swish"),
    "hard-swish-clip": ("clip", {(0, 0): 3.0, (1, 0): 1.0}, {(1, 1): 1.0 / 6.0}, "hard_swish"),
}


def polynomial(value: Value, atoms: tuple[Value, ...], depth: int = DEPTH) -> Polynomial | None:
    """`value` as a polynomial of degree <= 4 in the atoms with scalar coefficients; None if it is none."""
    value = origin(value)
    for index, atom in enumerate(atoms):
        if value is atom:
            return {tuple(int(i == index) for i in range(len(atoms))): 1.0}
    constant = scalar(value)
    unit = (0,) * len(atoms)
    if constant is not None:
        return {unit: constant}
    node = value.producer
    if node is None or depth == 0 or node.op.name not in ("add", "sub", "mul", "div", "neg", "pow"):
        return None
    terms = [polynomial(v, atoms, depth - 1) for v in node.operands if v is not None]
    one, two = terms[0], terms[-1]
    if one is None or two is None:
        return None
    match node.op.name:
        case "neg":
            return {k: -c for k, c in one.items()}
        case "add" | "sub":
            sign = 1.0 if node.op.name == "add" else -1.0
            total = dict(one)
            for k, c in two.items():
                total[k] = total.get(k, 0.0) + sign * c
            return total
        case "mul":
            return _product(one, two)
    if set(two) != {unit}:
        return None
    number = two[unit]
    if node.op.name == "div":
        return {k: c / number for k, c in one.items()} if number else None
    if number != int(number) or not 1 <= number <= DEGREE:
        return None
    power: Polynomial | None = one
    for _ in range(int(number) - 1):
        power = _product(power, one) if power is not None else None
    return power


def _product(one: Polynomial, two: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for k, c in one.items():
        for m, d in two.items():
            key = tuple(a + b for a, b in zip(k, m, strict=True))
            total[key] = total.get(key, 0.0) + c * d
    return total if all(sum(k) <= DEGREE for k in total) else None


def agrees(got: Polynomial, expected: Polynomial, tolerance: float) -> bool:
    """Equal up to a relative tolerance of each coefficient."""
    keys = {*got, *expected}
    return all(math.isclose(got.get(k, 0.0), expected.get(k, 0.0), rel_tol=tolerance, abs_tol=1e-300) for k in keys)


def _argument_atom(value: Value) -> Value:
    """The x of an argument written in x: the first value on the way back that several nodes read."""
    value = origin(value)
    for _ in range(DEPTH):
        node = value.producer
        if node is None or only_reader(value) is None or node.op.name not in ("add", "sub", "mul", "div", "neg"):
            break
        varying = [v for v in node.operands if v is not None and scalar(v) is None]
        # of x + 0.044715 x^3, of x * (1 + 0.044715 x^2): the operand that is read several times is x
        varying.sort(key=lambda v: only_reader(origin(v)) is not None)
        if not varying:
            break
        value = origin(varying[0])
    return value


def match_form(form: str, node: Node, trail: Trail) -> Site | None:
    """The activation `form` around node e = op(...)."""
    _, argument, result, _ = FORMS[form]
    operand = node.operand(0)
    if operand is None:
        return None
    tolerance = LOOSE.get(operand.dtype or "", LOOSE["f32"])
    if form == "hard-swish" and not (
        math.isclose(attribute(node, "alpha"), 1 / 6, rel_tol=tolerance) and attribute(node, "beta") == 0.5
    ):
        return trail.miss(1, "expected alpha 1/6 and beta 1/2", node)
    if form == "hard-swish-clip" and (scalar(node.operand(1)), scalar(node.operand(2))) != (0.0, 6.0):
        return trail.miss(1, "expected the limits 0 and 6", node)
    x = _argument_atom(operand)
    inner = polynomial(operand, (x,))
    if inner is None or not agrees(inner, {k[:1]: c for k, c in argument.items()}, tolerance):
        return trail.miss(1, f"its argument is {_text(inner)}; expected {_text(argument)}", node)
    e, current, depth = node.result, node.result, 2
    outer: Polynomial | None = None
    for _ in range(DEPTH):
        reader = only_reader(current)
        if reader is None:
            return trail.miss(depth, "it is read by several nodes, by none, or is an output", current)
        current = reader.result
        outer = polynomial(current, (x, e))
        if outer is None:
            return trail.miss(depth, "not a product with its own argument", reader)
        if agrees(outer, result, tolerance):
            exact = agrees(inner, {k[:1]: c for k, c in argument.items()}, TIGHT) and agrees(outer, result, TIGHT)
            if form == "hard-swish":
                exact = exact and math.isclose(attribute(node, "alpha"), 1 / 6, rel_tol=TIGHT)
            return Site(reader, (x,), {"x": x, "exact": exact, "anchor": node, "form": form})
        depth = min(depth + 1, trail.steps - 1)
        trail.miss(depth, f"it is {_text(outer)}; expected {_text(result)}", reader)
    return None


def _text(terms: Polynomial | None) -> str:
    if terms is None:
        return "no polynomial of x"
    parts = []
    for powers, c in sorted(terms.items()):
        names = [n if p == 1 else f"{n}^{p}" for n, p in zip("xe", powers, strict=False) if p]
        parts.append(" ".join([f"{c:.7g}", *names]))
    return " + ".join(parts)


def _apply(site: Site, rewriter: Rewriter) -> None:
    site.check()
    if not site.parts["exact"]:
        raise Declined("a constant is a rounding of the one expected: run name-constants before", site.parts["anchor"])
    form, x = site.parts["form"], site.parts["x"]
    attributes = {"approximate": "tanh" if form == "gelu-tanh" else "none"} if "gelu" in form else {}
    made = rewriter.insert(FORMS[form][3], [site.as_read(x)], attributes, before=site.root, source=site.root.source)
    site.supersede(rewriter, made.result)


def _rule(form: str) -> Rule:
    def match(node: Node, trail: Trail) -> Site | None:
        return match_form(form, node, trail)

    return Rule(form, frozenset({FORMS[form][0]}), 5, match, _apply)


@dataclass(frozen=True)
class RaiseActivations(PatternPass):
    """Gelu, SiLU and hard swish from arithmetic."""

    name = "raise-activations"
    exactness = Exactness.EXACT
    rules = tuple(_rule(form) for form in FORMS)
