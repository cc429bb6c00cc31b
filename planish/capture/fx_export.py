"""A torch module as an exported program without mutation; what torch says of it where it cannot be exported."""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from planish.ir.errors import FOREIGN, PlanishError

ADVICE = {  # by what torch says
    "which is not a known type": "leave it out of the outputs by the model's own options (use_cache=False, say), or "
    "register its class with torch.utils._pytree.register_pytree_node",
    "Exporting a ScriptModule": "capture the module that it was scripted or traced from",
    "uninitialized parameter": "run the module once on the inputs first: a lazy layer takes its sizes from them",
}
HINT = "capture runs the model once without data: it must not choose its path by the values of tensors"


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> ExportedProgram:
    """`functional`, with its errors as ours.

    Raises:
        PlanishError: the module does not run on the inputs, or torch cannot export it.
    """
    try:
        program = functional(module, args, kwargs, dynamic)
    except FOREIGN as error:
        if not _lazy(module):
            _run(module, args, kwargs)
        raise refusal(f"{type(module).__name__}: torch.export refuses the model", error) from error
    if _mixed(program):  # which torch.export does not look at
        _run(module, args, kwargs)
    return program


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the module for the error that it gives.

    Raises:
        PlanishError: it fails.
    """
    try:
        with quiet(), torch.no_grad():
            module(*args, **kwargs)
    except FOREIGN as error:
        raise refusal(f"inputs: {type(module).__name__} does not run on them", error, hint=None) from error


def _lazy(module: nn.Module) -> bool:
    """True if a parameter has no size yet: running the module would give it one."""
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters())


_ONE_DTYPE = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "convolution", "conv1d", "conv2d", "conv3d",
     "scaled_dot_product_attention"}
)  # fmt: skip


def _mixed(program: ExportedProgram) -> bool:
    """True if a product is of tensors of several dtypes."""
    for node in program.graph.nodes:
        space, _, rest = str(node.target).partition(".")
        if space == "aten" and rest.partition(".")[0] in _ONE_DTYPE:
            values = [operand.meta.get("val") for operand in node.all_input_nodes]
            floats = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype is not torch.bool}
            if len(floats) > 1:
                return True
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings of its own use of torch, and its logs of errors that are raised as well."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), redirect_stderr(_WithoutGraphs(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace")


class _WithoutGraphs:
    """A stream without the graphs that torch prints of what it could not export."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.ending = False  # the end of the line after a graph is to come

    def write(self, text: str) -> int:
        graph = text.lstrip().startswith("def forward(self")
        dropped, self.ending = graph or (self.ending and text == "\n"), graph
        return len(text) if dropped else int(self.stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def functional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> ExportedProgram:
    """The module as a program without mutation, whose ops are those that the IR has rows for."""
    with quiet(), torch.no_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
        return program.run_decompositions({})


def refusal(what: str, error: BaseException, hint: str | None = HINT) -> PlanishError:
    """An error of torch's as one of ours: its first line, and where in the user's code it arose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.split(r"\. (?=[A-Z])", lines[0])[0] if lines else type(error).__name__
    if text.startswith("Constraints violated"):  # of the dynamic shapes
        text = lines[1].removeprefix("- ") if len(lines) > 1 else text
        begin = lines.index("Suggested fixes:") if "Suggested fixes:" in lines else len(lines)
        fixes = [line for line in lines[begin + 1 :] if re.fullmatch(r"\w+ = .*", line)]
        hint = f"torch suggests the dynamic shapes {', '.join(fixes)}" if fixes else None
    for sign, advice in ADVICE.items():
        hint = advice if sign in text else hint
    homes = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(homes)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    return PlanishError(f"{what}: {text}", where=where, hint=hint)
