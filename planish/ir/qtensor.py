"""The quantised tensor: codes and scales, never "bits and a largest magnitude".

    y = (code - zero) * scale                 the scale of the block that the element lies in
    y = (code - zero_k) * scale_k             with clusters: k is the element's cluster

Codes are held unpacked, one a byte (or ml_dtypes' narrow floats); how they lie in memory is the business of
containers (`planish.codegen.containers`). Scales are multipliers; a scale per block beside a scale of the
tensor (NVFP4) is held as `scale` and `global_scale`, whose product counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planish.ir.types import bits, is_float


def cluster_dtype(clusters: int) -> str:
    """The dtype that holds the ids of so many clusters: u1 or u2."""
    return "u1" if clusters <= 2 else "u2"


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor of low-bit numbers.

    Attributes:
        codes: the shape of the tensor; integers in int8, uint8 or wider, floats in their ml_dtypes dtype.
        element: the IR dtype of the codes.
        axis: where a vector of scales lies, or along which blocks run (non-negative); None: `scale` broadcasts.
        block: elements along `axis` that share a scale; None: `scale` is a vector along `axis`.
        scale: float64, exact in `scale_dtype`. None block: [n] or broadcastable. Block: like codes with
            ceil(n / block) on `axis`. With clusters: a leading axis [clusters, ...].
        scale_dtype: the IR dtype in which scales are stored.
        zero: like `scale`, the numbers of codes (integers unless `zero_is_float`); None: no zero point.
        zero_is_float: the zero point is stored in the dtype of the scales.
        global_scale: of the whole tensor; None: 1.
        group_index: int64 [n], the block of each index of `axis`, where blocks are not consecutive.
        clusters: uint8, the shape of codes: which scale an element has; None: one cluster.
    """

    codes: np.ndarray
    element: str
    axis: int | None
    block: int | None
    scale: np.ndarray
    scale_dtype: str = "f32"
    zero: np.ndarray | None = None
    zero_is_float: bool = False
    global_scale: float | None = None
    group_index: np.ndarray | None = None
    clusters: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def spread(self, held: np.ndarray) -> np.ndarray:
        """A scale or zero point (of one cluster) so that it broadcasts against the codes."""
        if self.axis is None:
            return held
        if self.block is None:
            shape = [1] * self.codes.ndim
            shape[self.axis] = -1
            return held.reshape(shape)
        index = self.group_index
        if index is None:
            index = np.arange(self.codes.shape[self.axis]) // self.block
        spread: np.ndarray = np.take(held, index, self.axis)
        return spread

    def dequantize(self) -> np.ndarray:
        """The numbers that the codes stand for, float64."""
        codes, result = self.codes.astype(np.float64), np.zeros(self.codes.shape)
        if self.clusters is None:
            zero = 0.0 if self.zero is None else self.spread(self.zero)
            result = (codes - zero) * self.spread(self.scale)
        else:
            for k in range(len(self.scale)):
                zero = 0.0 if self.zero is None else self.spread(self.zero[k])
                result = np.where(self.clusters == k, (codes - zero) * self.spread(self.scale[k]), result)
        return result if self.global_scale is None else result * self.global_scale

    @cached_property
    def bits(self) -> float:
        """Bits per element: codes, cluster ids, scales and zero points."""
        total = float(bits(self.element)) * self.codes.size + bits(self.scale_dtype) * self.scale.size
        if self.clusters is not None:
            total += self.codes.size * bits(cluster_dtype(len(self.scale)))
        if self.zero is not None:
            total += self.zero.size * bits(self.scale_dtype if self.zero_is_float else self.element)
        if self.group_index is not None:
            total += 32 * len(self.group_index)
        return (total + (32 if self.global_scale is not None else 0)) / max(self.codes.size, 1)

    @property
    def is_float(self) -> bool:
        """True if its elements are floats."""
        return is_float(self.element)

    def transposed(self) -> QTensor:
        """The transpose of a matrix."""
        from dataclasses import replace

        def turned(held: np.ndarray | None) -> np.ndarray | None:
            if held is None or self.block is None:
                return held
            return np.swapaxes(held, -1, -2)

        scale = turned(self.scale)
        assert scale is not None
        ids = None if self.clusters is None else self.clusters.T
        axis = None if self.axis is None else 1 - self.axis
        return replace(self, codes=self.codes.T, scale=scale, zero=turned(self.zero), clusters=ids, axis=axis)
