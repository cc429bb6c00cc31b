"""Ranges and weight solvers: which scale a tensor gets, and which integer codes stand for a weight.

rtn    c = round(w / d)
gptq   columns in order of falling diag(H); after each, the columns left take up its error:
       e = (w_j - d c_j) / U_jj,   W_:,j+1: -= e U_j,j+1:      U = chol(H^-1)^T,  H = (2 / T) X^T X + damping
       Frantar et al., arXiv 2210.17323. Invariant: sum of e^2 / 2 = tr((W - Q) H (W - Q)^T) / 2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.linalg import cholesky, lapack

from planish.ir.stats import ChannelStats

BLOCK = 128  # columns whose errors are gathered before the rest is updated
RETRIES = 20  # of the factorisation, each with more damping
CLIPS = np.linspace(1.0, 0.5, 51)  # fractions of the range tried by the mse searches


def sqnr(exact: np.ndarray, got: np.ndarray) -> float:
    """Signal-to-quantisation-noise ratio in dB."""
    noise = float(((exact - got) ** 2).sum())
    return float("inf") if noise == 0 else 10.0 * float(np.log10(max(float((exact**2).sum()), 1e-300) / noise))


def choose_weight_scale(weight: np.ndarray, clip: Literal["max", "mse"]) -> np.ndarray:
    """One scale per row of [rows, columns] for int8 codes in [-127, 127]; float64 [rows], no zeros."""
    largest = np.abs(weight).max(1)
    largest[largest == 0] = 1.0
    best: np.ndarray = largest / 127.0
    least = np.full(len(weight), np.inf)
    for fraction in CLIPS if clip == "mse" else CLIPS[:1]:
        scale = largest * fraction / 127.0
        codes = np.clip(np.round(weight / scale[:, None]), -127, 127)
        error = ((codes * scale[:, None] - weight) ** 2).sum(1)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def choose_static_range(
    record: ChannelStats, rule: Literal["min-max", "percentile", "mse"], percentile: float
) -> tuple[float, int]:
    """Scale and zero point (uint8) of a tensor from its statistics; the range contains 0."""
    low, high = min(float(record.minimum.min()), 0.0), max(float(record.maximum.max()), 0.0)
    if rule == "percentile":
        tail = (100.0 - percentile) / 2.0
        low, high = (float(v) for v in np.percentile(record.samples, [tail, 100.0 - tail]))
        low, high = min(low, 0.0), max(high, 0.0)
    if rule == "mse":
        x = record.samples.astype(np.float64)
        trials = []
        for fraction in CLIPS:
            scale, zero = affine_range(low * fraction, high * fraction)
            got = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
            trials.append((float(((got - x) ** 2).sum()), scale, zero))
        return min(trials)[1:]
    return affine_range(low, high)


def affine_range(low: float, high: float) -> tuple[float, int]:
    """Scale (a float32 number) and zero point of uint8 codes for [low, high], which contains 0."""
    scale = float(np.float32((high - low) / 255.0)) or 1.0
    return scale, int(np.clip(np.round(-low / scale), 0, 255))


def round_to_nearest(weight: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    """Codes in [-limit, limit] of weight [rows, columns] with one scale per row; float64."""
    codes: np.ndarray = np.clip(np.round(weight / scale[:, None]), -limit, limit)
    return codes


def hessian(samples: np.ndarray) -> np.ndarray:
    """(2 / T) X^T X of the inputs [T, columns]; float64 [columns, columns]."""
    x = samples.astype(np.float64)
    return (2.0 / max(len(x), 1)) * (x.T @ x)


def gptq(
    weight: np.ndarray, scale: np.ndarray, limit: int, curvature: np.ndarray, damping: float = 0.01
) -> tuple[np.ndarray, float]:
    """Codes that keep the output of the layer, and the loss sum of e^2 / 2.

    Args:
        weight: [rows, columns], float64.
        scale: [rows], no zeros.
        limit: codes lie in [-limit, limit].
        curvature: H of what the layer reads, [columns, columns]; a column that is never used may be zero.
        damping: added to the diagonal of H, as a fraction of its mean; raised by the same amount while the
            factorisation fails.

    Raises:
        np.linalg.LinAlgError: H could not be factored with any damping.
    """
    order = np.argsort(-np.diag(curvature), kind="stable")
    h = curvature[np.ix_(order, order)].copy()
    w = weight[:, order].copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    upper = _inverse_factor(h, damping)
    columns = w.shape[1]
    codes = np.zeros_like(w)
    loss = 0.0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.zeros((len(w), stop - start))
        for j in range(start, stop):
            codes[:, j] = np.clip(np.round(w[:, j] / scale), -limit, limit)
            error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
            errors[:, j - start] = error
            w[:, j + 1 : stop] -= np.outer(error, upper[j, j + 1 : stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
        loss += float((errors**2).sum()) / 2.0
    back = np.empty_like(order)
    back[order] = np.arange(columns)
    return codes[:, back], loss


def _inverse_factor(h: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor U of H^-1 = U^T U, H damped as much as it takes."""
    step = damping * float(np.diag(h).mean())
    for attempt in range(1, RETRIES + 1):
        damped = h + np.eye(len(h)) * step * attempt
        try:
            lower = cholesky(damped, lower=True)
        except np.linalg.LinAlgError:
            continue
        inverse, failed = lapack.dpotri(lower, lower=True)
        if failed:
            continue
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        try:
            return cholesky(inverse, lower=False)
        except np.linalg.LinAlgError:
            continue
    raise np.linalg.LinAlgError("the curvature could not be factored")
