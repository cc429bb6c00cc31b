"""Pipelines as text: parsing and printing are inverse, and every mistake is named with its place."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.passes.base import Pass
from planish.passes.manager import Pipeline
from planish.passes.options import RANGE, Range, numeric_options
from planish.passes.pipeline import GROUPS, REGISTRY, make_pass, parse_pipeline, pass_class, print_pass, print_pipeline
from planish.passes.quantize import Quantize
from planish.passes.scale_channels import ScaleChannels
from planish.passes.shift_channels import ShiftChannels

# options that are text with a grammar of their own
GRAMMARS = {
    "weights": ("int8:channel", "uint4:g32", "int4:g64:half:bf16", "nvfp4", "mxfp4:even", "e4m3:tensor"),
    "activations": ("none", "int8:token", "uint8:tensor:static", "int4:g64", "mxfp8"),
    "embeddings": ("none", "int4:g32"),
    "scope": ("tensor", "row", "g64"),
}


def values(hint: Any, given: Range | None = None) -> st.SearchStrategy[Any]:
    """Values of an option of that type, in that range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(a, given) for a in arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if hint is str:
        printable = st.characters(codec="ascii", exclude_categories=["Cc"])
        return st.one_of(st.text(alphabet, min_size=1, max_size=8) for alphabet in (printable, 'a\\" {}[],='))
    least, most = (None, None) if given is None else (given.least if given.above is None else given.above, given.most)
    low, high = (default if end is None else int(end) for end, default in ((least, -1000), (most, 1000)))
    return {
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(
            least,
            most,
            exclude_min=given is not None and given.above is not None,
            allow_nan=False,
            allow_infinity=False,
        ),
        type(None): st.none(),
    }[hint]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    cls = pass_class(draw(st.sampled_from(sorted(REGISTRY))))
    hints = typing.get_type_hints(cls)
    drawn = {f.name: draw(values(hints[f.name], f.metadata.get(RANGE))) for f in dataclasses.fields(cls)}
    for name in {"skip", "only"} & set(drawn):  # regular expressions, checked when the pass is made
        drawn[name] = tuple(map(re.escape, drawn[name]))
    for name in (n for n in GRAMMARS if hints.get(n) is str):
        drawn[name] = draw(st.sampled_from(GRAMMARS[name]))
    try:
        return cls(**drawn)
    except PlanishError:  # options that exclude each other
        reject()


@given(st.lists(passes(), min_size=1, max_size=4))
def test_round_trip(instances: list[Pass]) -> None:
    text = print_pipeline(instances)
    again = parse_pipeline(text)
    assert again == instances
    assert print_pipeline(again) == text
    assert [str(p) for p in instances] == [print_pass(p) for p in again]


BAD_NUMBERS = {
    "rotate-channels{block=-1}": "option 'block': expected an integer of at least 1, or none; got -1",
    "rotate-channels{block=0}": "option 'block': expected an integer of at least 1, or none; got 0",
    "rotate-channels{seed=-2}": "option 'seed': expected an integer of at least 0, or none; got -2",
    "insert-hadamard{block=0}": "option 'block': expected an integer of at least 1, or none; got 0",
    "transform-channels{block=0}": "option 'block': expected an integer of at least 1; got 0",
    "transform-channels{condition=0.5}": "option 'condition': expected a number of at least 1; got 0.5",
    "transform-channels{strength=2}": "option 'strength': expected a number from 0 to 1; got 2.0",
    "scale-channels{steps=0}": "option 'steps': expected an integer of at least 1; got 0",
    "scale-channels{rows=0}": "option 'rows': expected an integer of at least 1; got 0",
    "scale-channels{alpha=1.5}": "option 'alpha': expected a number from 0 to 1; got 1.5",
    "scale-channels{alpha=nan}": "option 'alpha': expected a number from 0 to 1; got nan",
    "scale-channels{min-gain=-1}": "option 'min-gain': expected a number from 0 to 1; got -1.0",
    "shift-channels{amount=-1}": "option 'amount': expected a number of at least 0; got -1.0",
    "permute-channels{group=0}": "option 'group': expected an integer of at least 1; got 0",
    "isolate-outliers{ratio=0.5}": "option 'ratio': expected a number of at least 1; got 0.5",
    "isolate-outliers{count=0}": "option 'count': expected an integer of at least 1; got 0",
    "fold-norm-gain{sink-factor=0}": "option 'sink-factor': expected a number above 0; got 0.0",
    "fold-constants{max-growth=inf}": "option 'max-growth': expected a number of at least 0; got inf",
    "quantize{percentile=101}": "option 'percentile': expected a number above 0, at most 100; got 101.0",
    "quantize{min-rows=-1}": "option 'min-rows': expected an integer of at least 0; got -1",
    "merge-linears{min-group=0}": "option 'min-group': expected an integer of at least 1; got 0",
}


@pytest.mark.parametrize("text", BAD_NUMBERS)
def test_numbers_out_of_range(text: str) -> None:
    with pytest.raises(PlanishError) as error:
        Pipeline(text)
    assert str(error.value) == f"pass '{text.partition('{')[0]}': {BAD_NUMBERS[text]}"


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "7", None, float("nan")])
def test_numbers_given_in_python(value: Any) -> None:
    expected = (
        f"^pass 'scale-channels': option 'steps': expected an integer of at least 1; got {re.escape(repr(value))}$"
    )
    with pytest.raises(PlanishError, match=expected):
        ScaleChannels(steps=value)


@pytest.mark.parametrize("value", [2.5, True, float("inf")])
def test_numbers_that_are_no_integers(value: Any) -> None:
    """As YAML gives them: they are not rounded."""
    with pytest.raises(PlanishError, match=f"^pass 'scale-channels': option 'steps': expected int; got '{value}'$"):
        make_pass("scale-channels", {"steps": value})
    assert make_pass("scale-channels", {"steps": 3.0}) == ScaleChannels(steps=3)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "lower"])
def test_every_number_has_a_range(name: str) -> None:
    """And is checked: a number below the least is refused. (`lower` leaves its opset to the writer of ONNX files.)"""
    cls = pass_class(name)
    for option, (whole, _, range_) in numeric_options(cls).items():
        assert range_ is not None, option
        least = range_.least if range_.above is None else range_.above
        assert least is not None, option
        with pytest.raises(PlanishError, match=f"^pass '{name}': option '{option.replace('_', '-')}': expected a"):
            cls(**{option: int(least) - 1 if whole else least - 1.0})


def test_a_negative_seed() -> None:
    with pytest.raises(PlanishError, match=r"^seed: expected an integer of at least 0; got -1$"):
        Pipeline("fold-constants").run(Graph(), seed=-1)


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
    "quantize{activations=int8:token skip=[head ^last$]},lower{target=ort}",
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
        ('quantize{activations="int8:token"}', "quantize{activations=int8:token}"),
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
    made = make_pass(
        "quantize", {"activations": "uint8:tensor:static", "skip": ["a", "b"], "min-rows": 5, "embeddings": "none"}
    )
    assert made == Quantize(activations="uint8:tensor:static", skip=("a", "b"), min_rows=5, embeddings="none")
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
        "pass 'lower': unknown option 'targt'; expected target, opset, form, accuracy-level",
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
