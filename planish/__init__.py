"""planish: equivalence-preserving graph transformations that make neural networks quantise well.

The public names are imported when they are first used: `import planish` loads neither torch nor onnx.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "add_lora": "planish.passes.lora",
    "calibrating": "planish.integrate.calibrating",
    "capture": "planish.integrate.api",
    "collect": "planish.integrate.api",
    "convert": "planish.integrate.convert",
    "evaluate": "planish.ir.evaluator",
    "inspect": "planish.report.inspection",
    "lint": "planish.report.mapping",
    "load_module": "planish.integrate.optimized",
    "optimize": "planish.integrate.optimize",
    "save_module": "planish.integrate.optimized",
    "to_mlir": "planish.integrate.api",
    "to_onnx": "planish.integrate.api",
    "to_torch": "planish.integrate.api",
    "verify": "planish.integrate.api",
    "Graph": "planish.ir.graph",
    "Pipeline": "planish.passes.manager",
    "PlanishError": "planish.ir.errors",
    "Stats": "planish.ir.stats",
}

__all__ = [
    "add_lora", "calibrating", "capture", "collect", "convert", "evaluate", "inspect", "lint", "load_module",
    "optimize", "save_module", "to_mlir", "to_onnx", "to_torch", "verify",
    "Graph", "Pipeline", "PlanishError", "Stats", "__version__",
]  # fmt: skip

if TYPE_CHECKING:
    from planish.integrate.api import capture, collect, to_mlir, to_onnx, to_torch, verify
    from planish.integrate.calibrating import calibrating
    from planish.integrate.convert import convert
    from planish.integrate.optimize import optimize
    from planish.integrate.optimized import load_module, save_module
    from planish.ir.errors import PlanishError
    from planish.ir.evaluator import evaluate
    from planish.ir.graph import Graph
    from planish.ir.stats import Stats
    from planish.passes.lora import add_lora
    from planish.passes.manager import Pipeline
    from planish.report.inspection import inspect
    from planish.report.mapping import lint


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'planish' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Capture(ModuleType):
    """The package `planish.capture`, which is also the function `planish.capture(model)`."""

    def __call__(self, model: Any, inputs: Any = None, *, dynamic_shapes: Any = None) -> Any:
        return import_module(_PUBLIC["capture"]).capture(model, inputs, dynamic_shapes=dynamic_shapes)


class _Planish(ModuleType):
    """This module: what imports `planish.capture` puts the package under the name of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "capture" and isinstance(value, ModuleType):
            value.__class__ = _Capture
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Planish
