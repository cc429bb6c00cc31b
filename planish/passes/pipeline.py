"""Pipelines as text, the way mlir-opt writes them.

    raise,scale-channels{method=os-plus},quantize{weights=int8 activations=uint8:tensor}

`parse_pipeline` and `print_pipeline` are inverse to each other. Options are the fields of the pass's
dataclass; only those that differ from the defaults are printed.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from enum import Enum
from importlib import import_module
from typing import Any

from planish.ir.errors import PlanishError, nearest
from planish.passes.base import Pass

# name in pipelines: (module, class); a module is imported when its pass is first used
REGISTRY: dict[str, tuple[str, str]] = {
    "fold-constants": ("planish.passes.fold_constants", "FoldConstants"),
    "name-constants": ("planish.passes.name_constants", "NameConstants"),
    "raise-activations": ("planish.passes.raise_activations", "RaiseActivations"),
    "raise-norms": ("planish.passes.raise_norms", "RaiseNorms"),
    "raise-linear": ("planish.passes.raise_linear", "RaiseLinear"),
    "raise-rope": ("planish.passes.raise_rope", "RaiseRope"),
    "raise-attention": ("planish.passes.raise_attention", "RaiseAttention"),
    "raise-selective-scan": ("planish.passes.raise_selective_scan", "RaiseSelectiveScan"),
    "fold-batch-norm": ("planish.passes.fold_batch_norm", "FoldBatchNorm"),
    "fold-norm-gain": ("planish.passes.fold_norm_gain", "FoldNormGain"),
    "center-layer-norm": ("planish.passes.center_layer_norm", "CenterLayerNorm"),
    "merge-linears": ("planish.passes.merge_linears", "MergeLinears"),
    "rotate-channels": ("planish.passes.rotate_channels", "RotateChannels"),
    "transform-channels": ("planish.passes.transform_channels", "TransformChannels"),
    "insert-hadamard": ("planish.passes.insert_hadamard", "InsertHadamard"),
    "merge-hadamards": ("planish.passes.merge_hadamards", "MergeHadamards"),
    "shift-channels": ("planish.passes.shift_channels", "ShiftChannels"),
    "permute-channels": ("planish.passes.permute_channels", "PermuteChannels"),
    "reparameterize-norm": ("planish.passes.reparameterize_norm", "ReparameterizeNorm"),
    "fold-gates": ("planish.passes.fold_gates", "FoldGates"),
    "scale-channels": ("planish.passes.scale_channels", "ScaleChannels"),
    "isolate-outliers": ("planish.passes.isolate_outliers", "IsolateOutliers"),
    "split-layers": ("planish.passes.split_layers", "SplitLayers"),
    "extract-outliers": ("planish.passes.extract_outliers", "ExtractOutliers"),
    "extract-low-rank": ("planish.passes.extract_low_rank", "ExtractLowRank"),
    "disassemble-channels": ("planish.passes.disassemble_channels", "DisassembleChannels"),
    "reassemble-channels": ("planish.passes.reassemble_channels", "ReassembleChannels"),
    "quantize": ("planish.passes.quantize", "Quantize"),
    "lower": ("planish.codegen.lower", "Lower"),
}
# a name that stands for several passes
GROUPS: dict[str, str] = {
    "raise": "fold-constants,name-constants,raise-activations,raise-norms,raise-linear,raise-rope,raise-attention,"
    "raise-selective-scan,fold-constants",
}


def pass_class(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        PlanishError: no such pass.
    """
    if name not in REGISTRY:
        raise PlanishError(f"pass '{name}': unknown", hint=nearest(name, [*REGISTRY, *GROUPS]))
    module, cls = REGISTRY[name]
    return getattr(import_module(module), cls)  # type: ignore[no-any-return]


def parse_pipeline(text: str) -> list[Pass]:
    """The passes of a pipeline text, groups expanded.

    Raises:
        PlanishError: unknown pass or option, bad value, or bad syntax, with the column.
    """
    passes: list[Pass] = []
    for start, item in _split(text):
        name, options = _head(item, start, text)
        if name in GROUPS:
            if options:
                raise PlanishError(f"pipeline: '{name}' stands for several passes and takes no options", where=text)
            passes += parse_pipeline(GROUPS[name])
            continue
        passes.append(make_pass(name, options))
    if not passes:
        raise PlanishError("pipeline: empty; expected pass names separated by commas")
    return passes


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """A pass from its name and its options, as text or as values of the right type.

    Raises:
        PlanishError: unknown pass or option, or a bad value.
    """
    cls = pass_class(name)
    hints = typing.get_type_hints(cls)
    known = [f.name.replace("_", "-") for f in dataclasses.fields(cls)]
    values = {}
    for key, value in options.items():
        field, option = key.replace("-", "_"), key.replace("_", "-")
        if option not in known:
            expected = ", ".join(known) or "no options"
            raise PlanishError(
                f"pass '{name}': unknown option '{key}'; expected {expected}", hint=nearest(option, known)
            )
        values[field] = _convert(value, hints[field], f"pass '{name}': option '{key}'")
    return cls(**values)


def print_pass(instance: Pass) -> str:
    """The text of one pass."""
    options = []
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            options.append(f"{field.name.replace('_', '-')}={_text(value)}")
    return instance.name + (f"{{{' '.join(options)}}}" if options else "")


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a pipeline."""
    return ",".join(print_pass(p) for p in passes)


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + " ".join(_text(v) for v in value) + "]"
    if value is None:
        return "none"
    text = str(value)
    if text and not any(c in text for c in " {}[],=\"'"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str, position: int) -> bool:
    """True if an odd number of backslashes stands before the position."""
    before = text[:position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _split(text: str) -> list[tuple[int, str]]:
    """Items between the commas outside of braces, brackets and quotes, with their columns."""
    items, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        if c == '"' and not (quoted and _escaped(text, i)):
            quoted = not quoted
        elif not quoted:
            depth += (c in "{[") - (c in "}]")
            if depth < 0:
                raise _syntax(text, i, "unexpected closing bracket")
            if c == "," and depth == 0:
                items.append((start, text[start:i]))
                start = i + 1
    if depth or quoted:
        raise _syntax(text, len(text), "a bracket or quote is not closed")
    items.append((start, text[start:]))
    for column, item in items:
        if not item.strip() and len(items) > 1:
            raise _syntax(text, column, "expected a pass name")
    return [(column, item) for column, item in items if item.strip()]


def _syntax(text: str, column: int, what: str) -> PlanishError:
    return PlanishError(f"pipeline: {what} at column {column + 1}", where=f"{text}\n     {' ' * column}^")


def _head(item: str, start: int, text: str) -> tuple[str, dict[str, str]]:
    name, brace, rest = item.strip().partition("{")
    if not brace:
        return name.strip(), {}
    if not rest.endswith("}"):
        raise _syntax(text, start + len(item), "expected '}'")
    options: dict[str, str] = {}
    for word in _words(rest[:-1]):
        key, equals, value = word.partition("=")
        if not equals:
            raise _syntax(text, start + item.find(word), f"expected option=value, got '{word}'")
        options[key] = value
    return name.strip(), options


def _words(text: str) -> list[str]:
    words, word, depth, quoted = [], "", 0, False
    for i, c in enumerate(text):
        if c == '"' and not (quoted and _escaped(text, i)):
            quoted = not quoted
        depth += 0 if quoted else (c == "[") - (c == "]")
        if c in " \t\n" and not quoted and depth == 0:
            words.append(word)
            word = ""
        else:
            word += c
    return [w for w in [*words, word] if w]


def _unquoted(value: Any) -> Any:
    if isinstance(value, str) and value[:1] == '"' and value[-1:] == '"' and len(value) > 1:
        return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
    return value


def _convert(value: Any, hint: Any, what: str) -> Any:
    """A value of the annotated type from text (or from a value of YAML)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            if type(None) in arguments:
                return None
        choices = [a for a in arguments if a is not type(None)]
        for choice in choices[:-1]:
            try:
                return _convert(value, choice, what)
            except PlanishError:
                continue
        return _convert(value, choices[-1], what)
    if origin is typing.Literal:
        value = _unquoted(value)
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        expected = ", ".join(str(a) for a in arguments)
        raise PlanishError(
            f"{what}: expected one of {expected}; got '{value}'", hint=nearest(str(value), map(str, arguments))
        )
    if origin is tuple:
        items = _words(value[1:-1]) if isinstance(value, str) and value.startswith("[") else value
        if isinstance(items, str):
            items = [items]
        return tuple(_convert(v, arguments[0], what) for v in items)
    value = _unquoted(value)
    if hint is bool:
        if value in (True, False):
            return bool(value)
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif hint in (int, float):
        try:
            number = hint(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and not isinstance(value, bool) and (isinstance(value, str) or number == value):
            return number
    elif hint is str:
        return str(value)
    elif isinstance(hint, type) and issubclass(hint, Enum):
        return _convert(value, typing.Literal[tuple(m.value for m in hint)], what) and hint(value)
    elif hint is Any:
        return value
    raise PlanishError(f"{what}: expected {getattr(hint, '__name__', hint)}; got '{value}'")
