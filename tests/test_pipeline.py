"""Pipelines as text: parsing and printing are inverse, and every mistake is named with its place."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.errors import PlanishError
from planish.passes.base import Pass
from planish.passes.manager import Pipeline
from planish.passes.pipeline import GROUPS, REGISTRY, make_pass, parse_pipeline, pass_class, print_pass, print_pipeline
from planish.passes.quantize import Quantize
from planish.passes.scale_channels import ScaleChannels
from planish.passes.shift_channels import ShiftChannels


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option of that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(a) for a in arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if hint is str:
        printable = st.characters(codec="ascii", exclude_categories=["Cc"])
        return st.one_of(st.text(alphabet, min_size=1, max_size=8) for alphabet in (printable, 'a\\" {}[],='))
    return {
        bool: st.booleans(),
        int: st.integers(-1000, 1000),
        float: st.floats(allow_nan=False, allow_infinity=False),
        type(None): st.none(),
    }[hint]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    cls = pass_class(draw(st.sampled_from(sorted(REGISTRY))))
    hints = typing.get_type_hints(cls)
    drawn = {f.name: draw(values(hints[f.name])) for f in dataclasses.fields(cls)}
    if "skip" in drawn:  # regular expressions, checked when the pass is made
        drawn["skip"] = tuple(map(re.escape, drawn["skip"]))
    return cls(**drawn)


@given(st.lists(passes(), min_size=1, max_size=4))
def test_round_trip(instances: list[Pass]) -> None:
    text = print_pipeline(instances)
    again = parse_pipeline(text)
    assert again == instances
    assert print_pipeline(again) == text
    assert [str(p) for p in instances] == [print_pass(p) for p in again]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_pass(name: str) -> None:
    """Registered under its own name, frozen, every option with a default, printed bare."""
    cls = pass_class(name)
    assert cls.name == name
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    instance = cls()
    assert str(instance) == name
    assert parse_pipeline(name) == [instance]
    assert cls.needs | cls.gives | cls.breaks <= frozenset(
        f for other in map(pass_class, REGISTRY) for f in other.gives | other.needs | other.breaks
    )


TEXTS = [
    "shift-channels",
    "raise-norms,raise-linear",
    "shift-channels{amount=0.5}",
    "scale-channels{method=os-plus alpha=0.75 steps=10 insert=true}",
    "quantize{activations=token skip=[head ^last$]},lower{target=ort}",
    'quantize{skip=["a b" "c,d" "e=f" "{g}" "h\\"i" "[j]"]}',
]


@pytest.mark.parametrize("text", TEXTS)
def test_canonical_texts(text: str) -> None:
    assert str(Pipeline(text)) == text
    assert print_pipeline(parse_pipeline(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("  shift-channels , scale-channels  ", "shift-channels,scale-channels"),
        ("shift-channels,", "shift-channels"),
        ("shift-channels{}", "shift-channels"),
        ("shift-channels{ amount=1.0 }", "shift-channels"),
        ("scale-channels{min_gain=0.2}", "scale-channels{min-gain=0.2}"),
        ("scale-channels{\n  insert=True\n  steps=5\n}", "scale-channels{steps=5 insert=true}"),
        ("quantize{skip=head}", "quantize{skip=[head]}"),
        ("quantize{skip=[]}", "quantize"),
        ('quantize{activations="token"}', "quantize{activations=token}"),
    ],
)
def test_other_spellings(text: str, canonical: str) -> None:
    if text.endswith(","):  # a comma that ends the text
        with pytest.raises(PlanishError, match="expected a pass name"):
            parse_pipeline(text)
        return
    assert print_pipeline(parse_pipeline(text)) == canonical


def test_groups_are_expanded() -> None:
    for name, text in GROUPS.items():
        assert parse_pipeline(name) == parse_pipeline(text)
        assert str(Pipeline(f"{name},shift-channels")) == f"{text},shift-channels"


def test_options_as_values() -> None:
    made = make_pass("quantize", {"activations": "static", "skip": ["a", "b"], "min-rows": 5, "embeddings": False})
    assert made == Quantize(activations="static", skip=("a", "b"), min_rows=5, embeddings=False)
    assert make_pass("scale-channels", {"alpha": 1}) == ScaleChannels(alpha=1.0)
    assert make_pass("shift-channels", {"amount": "0.5"}) == ShiftChannels(amount=0.5)


def test_a_list_of_passes() -> None:
    listed: Sequence[Pass] = [ShiftChannels(amount=0.5), ScaleChannels()]
    assert str(Pipeline(listed)) == "shift-channels{amount=0.5},scale-channels"


# what is wrong, where, the hint
MISTAKES: dict[str, tuple[str, str | None, str | None]] = {
    "": ("pipeline: empty; expected pass names separated by commas", None, None),
    "  ": ("pipeline: empty; expected pass names separated by commas", None, None),
    "shift-channel": ("pass 'shift-channel': unknown", None, "did you mean 'shift-channels'?"),
    "rais": ("pass 'rais': unknown", None, "did you mean 'raise'?"),
    "zzz": ("pass 'zzz': unknown", None, None),
    "raise{bias=true}": ("pipeline: 'raise' stands for several passes and takes no options", "raise{bias=true}", None),
    "a,,b": ("pipeline: expected a pass name at column 3", "a,,b\n       ^", None),
    ",a": ("pipeline: expected a pass name at column 1", ",a\n     ^", None),
    "a{": ("pipeline: a bracket or quote is not closed at column 3", "a{\n       ^", None),
    'a{b="c}': ("pipeline: a bracket or quote is not closed at column 8", 'a{b="c}\n            ^', None),
    "a}": ("pipeline: unexpected closing bracket at column 2", "a}\n      ^", None),
    "lower{target=ort}x": ("pipeline: expected '}' at column 19", "lower{target=ort}x\n                       ^", None),
    "lower{ort}": ("pipeline: expected option=value, got 'ort' at column 7", "lower{ort}\n           ^", None),
    "raise-norms,lower{ort}": (
        "pipeline: expected option=value, got 'ort' at column 19",
        "raise-norms,lower{ort}\n                       ^",
        None,
    ),
    "lower{targt=ort}": (
        "pass 'lower': unknown option 'targt'; expected target, opset",
        None,
        "did you mean 'target'?",
    ),
    "raise-norms{x=1}": ("pass 'raise-norms': unknown option 'x'; expected no options", None, None),
    "scale-channels{minn-gain=1}": (
        "pass 'scale-channels': unknown option 'minn-gain'; expected method, alpha, granularity, steps, rows, insert, "
        "min-gain",
        None,
        "did you mean 'min-gain'?",
    ),
    "lower{target=otr}": (
        "pass 'lower': option 'target': expected one of onnx, ort; got 'otr'",
        None,
        "did you mean 'ort'?",
    ),
    "scale-channels{steps=many}": ("pass 'scale-channels': option 'steps': expected int; got 'many'", None, None),
    "scale-channels{steps=1.5}": ("pass 'scale-channels': option 'steps': expected int; got '1.5'", None, None),
    "scale-channels{alpha=}": ("pass 'scale-channels': option 'alpha': expected float; got ''", None, None),
    "scale-channels{insert=maybe}": ("pass 'scale-channels': option 'insert': expected bool; got 'maybe'", None, None),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text: str) -> None:
    what, where, hint = MISTAKES[text]
    with pytest.raises(PlanishError) as caught:
        parse_pipeline(text)
    found = caught.value
    if "minn-gain" in text:  # the list of options grows
        assert found.what.startswith(what[: what.index("; expected")])
        assert (found.where, found.hint) == (where, hint)
        return
    assert (found.what, found.where, found.hint) == (what, where, hint)
