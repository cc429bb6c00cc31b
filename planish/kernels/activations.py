"""Activation functions, elementwise on float32 tiles.

    sigmoid    1 / (1 + exp(-x))                  silu    x sigmoid(x)
    tanh       2 sigmoid(2 x) - 1, and for |x| < 1/8 its series x - x^3/3 + 2 x^5/15 - 17 x^7/315, where that cancels
    gelu       x (1 + erf(x / sqrt 2)) / 2        gelu_tanh    x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))

Triton's interpreter has no libdevice: tanh and log1p are written out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    square = x * x
    series = x * (1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825396825397)))
    return tl.where(tl.abs(x) < 0.125, series, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def gelu(x):
    """x Phi(x), Phi the normal distribution function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def softplus(x):
    """ln(1 + exp(x)); ln(1 + e) as e ln(1 + e) / ((1 + e) - 1), which keeps its digits for a small e."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def hard_sigmoid(x, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """clamp(ALPHA x + BETA, 0, 1)."""
    return tl.minimum(tl.maximum(x * ALPHA + BETA, 0.0), 1.0)


@triton.jit
def hard_swish(x):
    """x clamp(x / 6 + 1/2, 0, 1)."""
    return x * tl.minimum(tl.maximum(x / 6.0 + 0.5, 0.0), 1.0)


@triton.jit
def leaky_relu(x, ALPHA: tl.constexpr):
    """x where x >= 0, else ALPHA x."""
    return tl.where(x >= 0.0, x, x * ALPHA)


@triton.jit
def elu(x, ALPHA: tl.constexpr):
    """x where x > 0, else ALPHA (exp(x) - 1)."""
    return tl.where(x > 0.0, x, ALPHA * (tl.exp(tl.minimum(x, 0.0)) - 1.0))


def sigmoid_reference(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def silu_reference(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return torch.nn.functional.silu(x)


def tanh_reference(x: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x)."""
    return torch.nn.functional.gelu(x)


def gelu_tanh_reference(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x), Phi by the hyperbolic tangent."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def softplus_reference(x: torch.Tensor) -> torch.Tensor:
    """ln(1 + exp(x))."""
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


def hard_sigmoid_reference(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """clamp(alpha x + beta, 0, 1)."""
    return (alpha * x + beta).clamp(0, 1)


def hard_swish_reference(x: torch.Tensor) -> torch.Tensor:
    """x clamp(x / 6 + 1/2, 0, 1)."""
    return x * (x / 6 + 0.5).clamp(0, 1)


def leaky_relu_reference(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """x where x >= 0, else alpha x."""
    return torch.nn.functional.leaky_relu(x, alpha)


def elu_reference(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """x where x > 0, else alpha (exp(x) - 1)."""
    return torch.nn.functional.elu(x, alpha)
