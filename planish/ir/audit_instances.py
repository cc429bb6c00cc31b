"""The instances on which the op table is audited: for each op some operands and attributes.

An op without instances fails the audit, so a new row brings its instances along. Dims are small and mostly
different from each other, so that a claim about the wrong axis shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from planish.ir.audit_lookup import instances as lookups
from planish.ir.audit_trial import Instance, Operand
from planish.ir.constant import Constant
from planish.ir.types import numpy_dtype


def _a(*shape: int, draw: Any = "normal", dtype: str = "f32") -> Operand:
    """An activation."""
    return Operand(shape, draw=draw, dtype=dtype)


def _c(*shape: int, draw: Any = "normal", dtype: str = "f32") -> Operand:
    """A constant."""
    return Operand(shape, constant=True, draw=draw, dtype=dtype)


def _i(*values: Any) -> Operand:
    """A constant vector of indices, axes or sizes."""
    data = np.array(values, np.int64)
    return Operand(data.shape, constant=True, draw=data, dtype="i64")


def _scalar(value: float | int) -> Operand:
    data = np.array(value, np.int64 if isinstance(value, int) else np.float64)
    return Operand((), constant=True, draw=data, dtype="i64" if isinstance(value, int) else "f32")


def _same(index: int) -> Operand:
    """The same value as an earlier operand."""
    return Operand((), same=index)


def _on(*operands: Operand | None, **attributes: Any) -> Instance:
    return Instance(operands, attributes)


def _unary(draw: str = "normal", **attributes: Any) -> list[Instance]:
    return [_on(_a(*shape, draw=draw), **attributes) for shape in ((5,), (3, 4), (2, 3, 4))]


_BROADCASTS: Sequence[Sequence[Operand]] = (
    (_a(3, 4), _a(3, 4)),
    (_a(2, 3, 4), _a(2, 3, 4)),
    (_a(3, 4), _c(4)),
    (_c(4), _a(3, 4)),
    (_a(3, 4), _c(3, 4)),
    (_a(2, 3, 4), _a(3, 4)),
    (_a(3, 4), _a(2, 3, 4)),
    (_a(3, 4), _a(1, 4)),
    (_a(3, 1), _a(1, 4)),
    (_a(2, 3, 4), _c(3, 1)),
    (_a(2, 3, 4), _c(1, 3, 4)),
    (_a(3, 4), _c()),
    (_c(1), _a(3, 4)),
    (_a(3, 4), _a()),
    (_a(3, 4), _a(1)),
    (_a(3, 4), _same(0)),
)


def _redrawn(operands: Iterable[Operand], draw: str, dtype: str) -> list[Operand]:
    return [Operand(o.shape, o.constant, draw, dtype, o.same) for o in operands]


def _binary(draw: str = "normal", dtype: str = "f32", **attributes: Any) -> list[Instance]:
    return [_on(*_redrawn(pair, draw, dtype), **attributes) for pair in _BROADCASTS]


def _elementwise() -> dict[str, list[Instance]]:
    plain = [
        *("neg", "abs", "relu", "elu", "silu", "sigmoid", "hard_sigmoid", "hard_swish", "tanh", "erf", "exp"),
        *("softplus", "sin", "cos", "floor", "ceil", "round", "sign", "is_nan", "identity"),
    ]
    table = {name: _unary() for name in plain}
    table["leaky_relu"] = [*_unary(), *_unary(alpha=0.3), *_unary(alpha=-0.5)]
    table["elu"] += _unary(alpha=0.5)
    table["gelu"] = [*_unary(), *_unary(approximate="tanh")]
    table["log"] = _unary("positive")
    table["sqrt"] = _unary("positive")
    table["rsqrt"] = _unary("positive")
    table["reciprocal"] = _unary("nonzero")
    table["logical_not"] = [_on(_a(3, 4, draw="bool", dtype="bool"))]
    table["cast"] = [*_unary(to="f16"), *_unary(to="f64"), *_unary(to="i64"), *_unary(to="bool")]
    table["cast"].append(_on(_a(3, 4, draw="integer", dtype="i64"), to="f32"))
    for name in ("add", "sub", "mul", "max", "min", "less", "less_equal", "greater", "greater_equal"):
        table[name] = _binary()
    table["div"] = _binary("nonzero")
    table["pow"] = [
        *_binary("positive"),
        *(_on(_a(3, 4), _scalar(p)) for p in (2.0, 3.0)),
        _on(_a(3, 4, draw="positive"), _scalar(0.5)),
    ]
    table["mod"] = [
        *_binary("nonzero", fmod=True),
        _on(_a(3, 4, draw="integer", dtype="i64"), _i(3, 4, 5, 7)),
    ]
    table["equal"] = [*_binary("few"), *_binary("integer", "i64")]
    for name in ("logical_and", "logical_or", "logical_xor"):
        table[name] = _binary("bool", "bool")
    table["clip"] = [
        _on(_a(3, 4), _scalar(-1.0), _scalar(1.0)),
        _on(_a(2, 3, 4), _scalar(0.0)),
        _on(_a(3, 4), None, _scalar(0.5)),
        _on(_a(3, 4), _a(), _a(draw="positive")),
        _on(_a(3, 4)),
    ]

    def conditions(*shape: int) -> list[Operand]:
        return [_a(*shape, draw="bool", dtype="bool"), _c(*shape, draw="bool", dtype="bool")]

    table["where"] = [
        _on(condition, x, y)
        for condition, x, y in (
            *((k, _a(3, 4), _a(3, 4)) for k in conditions(3, 4)),
            *((k, _a(3, 4), _scalar(0.0)) for k in conditions(3, 4)),
            *((k, _a(3, 4), _scalar(-30.0)) for k in conditions(4)),
            *((k, _scalar(0.0), _a(2, 3, 4)) for k in conditions(3, 1)),
            *((k, _a(3, 4), _c(4)) for k in conditions(3, 1)),
            *((k, _a(3, 4), _a(4)) for k in conditions(1)),
            (conditions(3, 4)[0], _a(3, 4), _same(1)),
        )
    ]
    table["prelu"] = [
        _on(_a(3, 4), _c(4)),
        _on(_a(2, 3, 4), _c(3, 1)),
        _on(_a(3, 4), _c(1)),
        _on(_a(3, 4), _c()),
        _on(_a(2, 3, 4), _a(3, 4)),
        _on(_a(3, 4), _c(4, draw="positive")),
    ]
    return table


def _structural() -> dict[str, list[Instance]]:
    index = _a(5, draw="integer", dtype="i64")
    return {
        "reshape": [
            _on(_a(2, 6), _i(2, 2, 3)),
            _on(_a(2, 3, 4), _i(2, 12)),
            _on(_a(2, 3, 4), _i(0, -1)),
            _on(_a(2, 3, 4), _i(6, 4)),
            _on(_a(2, 6), _i(3, 4)),
            _on(
                _a(
                    6,
                ),
                _i(2, 3),
            ),
            _on(_a(2, 3, 4), _i(2, 1, 3, 4)),
            _on(_a(2, 12), _i(2, 2, 2, 3)),
            _on(_c(4, 6), _i(4, 2, 3)),
        ],
        "transpose": [
            _on(_a(2, 3), perm=(1, 0)),
            _on(_a(2, 3, 4), perm=(0, 2, 1)),
            _on(_a(2, 3, 4), perm=(2, 0, 1)),
            _on(_a(2, 3, 4, 2), perm=(0, 2, 1, 3)),
        ],
        "concat": [
            _on(_a(2, 3), _a(2, 4), axis=1),
            _on(_a(2, 3), _a(4, 3), axis=0),
            _on(_a(2, 3, 4), _a(2, 2, 4), _a(2, 1, 4), axis=-2),
            _on(_a(2, 3), _c(2, 2), axis=1),
            _on(_a(2, 3), _same(0), axis=1),
        ],
        "split": [
            _on(_a(2, 6), axis=1, sizes=(2, 4)),
            _on(_a(6, 3), axis=0, sizes=(2, 2, 2)),
            _on(_a(2, 3, 4), axis=-1, sizes=(1, 3)),
        ],
        "slice": [
            _on(_a(2, 6), _i(1), _i(4), _i(1)),
            _on(_a(2, 6), _i(0, 1), _i(2, 6)),
            _on(_a(5, 6), _i(-1), _i(-100), _i(0), _i(-1)),
            _on(_a(2, 6, 3), _i(0), _i(6), _i(-2), _i(2)),
        ],
        "gather": [
            _on(_a(4, 3), _i(2, 0, 3), axis=0),
            _on(_a(3, 4), _i(3, 2, 1, 0), axis=1),
            _on(_a(3, 4), _i(0, 0, 1, 1), axis=1),
            _on(_a(3, 4), _i(0, 0, 1), axis=-1),
            _on(_a(3, 4), _scalar(2), axis=1),
            _on(_a(3, 4), _i((0, 1), (2, 3)), axis=1),
            _on(_a(7, 4), Operand((5,), draw="integer", dtype="i64"), axis=0),
            _on(_c(7, 4), index, axis=0),
        ],
        "embedding": [
            _on(_c(7, 4), index),
            _on(_c(7, 4), _a(2, 3, draw="integer", dtype="i64")),
            _on(_a(7, 4), index),
        ],
        "unsqueeze": [_on(_a(2, 3), axes=(0,)), _on(_a(2, 3), axes=(1, 3)), _on(_a(2, 3), axes=(-1,))],
        "squeeze": [_on(_a(2, 1, 3), axes=(1,)), _on(_a(1, 2, 1, 3), axes=(0, -2))],
        "expand": [
            _on(_a(3, 4), _i(2, 3, 4)),
            _on(_a(1, 4), _i(3, 4)),
            _on(_a(2, 1, 3), _i(2, 4, 1)),
            _on(_c(3, 1), _i(3, 4)),
        ],
        "flatten": [
            _on(_a(2, 3, 4)),
            _on(_a(2, 3, 4), axis=2),
            _on(_a(2, 3, 4), axis=0),
            _on(_a(2, 3), axis=-1),
        ],
        "pad": [
            _on(_a(3, 4), _i(0, 1, 0, 2)),
            _on(_a(3, 4), _i(0, 1, 0, 2), _scalar(1.5)),
            _on(_a(3, 4), _i(1, 2), None, _i(1)),
            _on(_a(2, 3, 4), _i(0, 0, 1, 0, 0, 1), mode="reflect"),
            _on(_a(2, 3, 4), _i(0, 0, 1, 0, 0, 1), mode="edge"),
            _on(_a(2, 3, 4), _i(0, 0, 1, 0, 0, 1), mode="wrap"),
            _on(_a(3, 4), _i(0, -1, 0, 0)),
            _on(_a(3, 4), _i(1, 2), _scalar(0.0), _i(0)),
        ],
        "tile": [_on(_a(2, 3), _i(1, 2)), _on(_a(2, 3), _i(3, 1)), _on(_a(2, 3, 4), _i(1, 2, 1))],
        "shape": [_on(_a(2, 3, 4)), _on(_a(2, 3, 4), start=1, end=2), _on(_a(2, 3), start=-1)],
        "constant_of_shape": [_on(_i(2, 3), value=Constant(np.array([1.5], np.float32), "f32", (1,)))],
        "range": [_on(_scalar(0), _scalar(6), _scalar(2)), _on(_scalar(0.0), _scalar(3.0), _scalar(0.5))],
        "trilu": [_on(_a(3, 4)), _on(_a(2, 3, 3), _scalar(1), upper=False), _on(_a(3, 3), _scalar(-1))],
    }


def _contraction() -> dict[str, list[Instance]]:
    linears = [
        _on(_a(2, 4), _c(3, 4), _c(3)),
        _on(_a(2, 4), _c(3, 4)),
        _on(_a(2, 3, 4), _c(4, 5), _c(5), transposed=True),
        _on(_a(2, 3, 4), _c(4, 3), transposed=True),
        _on(_a(2, 2, 3, 4), _c(5, 4), _c(5)),
        _on(_a(4), _c(3, 4), _c(3)),
        _on(_a(2, 4), _c(3, 4), _c(1)),
        _on(_a(2, 4), _a(3, 4), _a(3)),
        _on(_a(2, 3, 4), _a(3, 4)),
        _on(_a(4, 4), _c(4, 4), _c(4)),
    ]
    matmuls = [
        _on(_a(2, 3), _a(3, 4)),
        _on(_a(2, 3), _c(3, 4)),
        _on(_c(2, 3), _a(3, 4)),
        _on(_a(2, 3, 4), _a(2, 4, 5)),
        _on(_a(2, 3, 4), _c(4, 5)),
        _on(_a(3, 4), _a(2, 4, 5)),
        _on(_a(2, 3, 2, 4), _a(2, 3, 4, 5)),
        _on(_a(2, 3, 2, 4), _a(3, 4, 5)),
        _on(_a(2, 1, 2, 4), _a(1, 3, 4, 5)),
        _on(_a(2, 3, 4, 2), _c(1, 3, 2, 5)),
        _on(_a(4), _a(4, 3)),
        _on(_a(2, 3, 4), _a(4)),
        _on(_a(4), _a(4)),
        _on(_a(2, 4), _a(3, 4, 5)),
        _on(_a(3, 3), _same(0)),
        _on(_a(2, 3, 4, draw="rows"), _a(2, 4, 5)),
        _on(_a(2, 3, 2, 4, draw="rows"), _a(2, 3, 4, 5)),
        _on(_a(2, 3, 2, 4, draw="rows"), _a(3, 4, 5)),
    ]
    gemms = [
        _on(_a(2, 4), _c(4, 3), _c(3)),
        _on(_a(2, 4), _c(3, 4), _c(3), trans_b=True),
        _on(_a(4, 2), _c(4, 3), trans_a=True, alpha=0.5),
        _on(_a(4, 2), _c(3, 4), _c(2, 3), trans_a=True, trans_b=True, alpha=2.0, beta=0.25),
        _on(_a(2, 4), _c(4, 3), _c(2, 1)),
        _on(_a(2, 4), _c(4, 3), _c()),
        _on(_a(2, 4), _c(4, 3), _c(1, 3), beta=2.0),
        _on(_a(2, 4), _c(4, 3), _c(3), beta=0.0),
        _on(_a(2, 4), _a(4, 3), _a(2, 3)),
        _on(_a(2, 4), _a(4, 3), _a(3), beta=3.0),
        _on(_a(2, 4), _a(4, 3), _a(2, 1)),
    ]
    convs = [
        _on(_a(2, 3, 6), _c(4, 3, 3), _c(4)),
        _on(_a(2, 3, 6), _c(4, 3, 3), _c(4), pads=(1, 1)),
        _on(_a(2, 3, 5, 6), _c(4, 3, 3, 2), _c(4), strides=(2, 1), dilations=(1, 2), pads=(1, 0, 2, 1)),
        _on(_a(2, 3, 4, 4), _c(5, 3, 1, 1)),
        _on(_a(1, 2, 3, 3, 3), _c(3, 2, 2, 2, 2), _c(3)),
        _on(_a(2, 3, 6), _c(4, 3, 3), auto_pad="same_upper", strides=(2,)),
        _on(_a(2, 3, 6), _c(4, 3, 3), _c(4), auto_pad="valid"),
        _on(_a(2, 4, 6), _c(6, 2, 3), _c(6), groups=2),
        _on(_a(2, 4, 6), _c(4, 1, 3), _c(4), groups=4),
        _on(_a(2, 4, 6), _c(4, 1, 3), groups=4, pads=(1, 1)),
        _on(_a(2, 4, 6), _c(8, 1, 3), _c(8), groups=4),
        _on(_a(2, 3, 6), _a(4, 3, 3), _a(4)),
    ]
    transposed = [
        _on(_a(2, 3, 6), _c(3, 4, 3), _c(4)),
        _on(_a(2, 3, 4, 5), _c(3, 4, 3, 2), strides=(2, 1), pads=(1, 0, 1, 1), output_padding=(1, 0)),
        _on(_a(2, 4, 6), _c(4, 3, 3), _c(6), groups=2, dilations=(2,)),
        _on(_a(2, 4, 6), _c(4, 1, 3), _c(4), groups=4),
        _on(_a(2, 3, 6), _c(3, 4, 3), auto_pad="same_upper", strides=(2,)),
        _on(_a(2, 3, 6), _c(3, 4, 3), strides=(2,), output_shape=(12,)),
    ]
    return {"linear": linears, "matmul": matmuls, "gemm": gemms, "conv": convs, "conv_transpose": transposed}


def _normalisation() -> dict[str, list[Instance]]:
    shared = [
        _on(_a(3, 4), _c(4), _c(4)),
        _on(_a(2, 3, 4), _c(4)),
        _on(_a(2, 3, 4)),
        _on(_a(2, 3, 4), None, _c(4)),
        _on(_a(2, 3, 4), _c(3, 4), _c(3, 4), axis=-2),
        _on(_a(2, 3, 4), _c(4), _c(1), axis=-2),
        _on(_a(2, 3, 4), _a(2, 1, 4), _a(2, 1, 4)),
        _on(_a(2, 3, 4), _c(1), _c(4)),
        _on(_a(2, 3, 4), _c(4, draw="equal"), _c(4)),
        _on(_a(5), _c(5)),
    ]
    return {
        "layer_norm": shared,
        "rms_norm": [
            *shared,
            _on(_a(2, 3, 4), _c(4), gain_offset=1.0),
            _on(_a(2, 3, 4), gain_offset=1.0),
            _on(_a(2, 3, 4), _c(1), _c(4), gain_offset=1.0),
            _on(_a(2, 3, 4), _a(4), gain_offset=1.0),
        ],
        "batch_norm": [
            _on(_a(2, 3, 4), *(_c(3) for _ in range(3)), _c(3, draw="positive")),
            _on(_a(5, 3), *(_c(3) for _ in range(3)), _c(3, draw="positive"), eps=0.01),
            _on(_a(2, 3, 4, 2), *(_a(3) for _ in range(3)), _a(3, draw="positive")),
        ],
        "group_norm": [
            _on(_a(2, 4, 3), _c(4), _c(4), groups=2),
            _on(_a(2, 4, 3), _c(4), _c(4), groups=1),
            _on(_a(2, 4, 3), _c(4), _c(4), groups=4),
            _on(_a(2, 4, 3, 2), groups=2),
            _on(_a(2, 4, 3), groups=1),
            _on(_a(2, 4, 3), _a(4), None, groups=4),
        ],
        "instance_norm": [_on(_a(2, 4, 3), _c(4), _c(4)), _on(_a(2, 3, 4, 2), _a(3), _a(3))],
        "softmax": [_on(_a(3, 4)), _on(_a(2, 3, 4), axis=1), _on(_a(2, 3, 4), axis=-1)],
        "log_softmax": [_on(_a(3, 4)), _on(_a(2, 3, 4), axis=1), _on(_a(2, 3, 4), axis=-1)],
    }


def _reduction() -> dict[str, list[Instance]]:
    def reductions(draw: str = "normal") -> list[Instance]:
        return [
            _on(_a(3, 4, draw=draw), axes=(1,)),
            _on(_a(3, 4, draw=draw), axes=(0,), keepdims=False),
            _on(_a(2, 3, 4, draw=draw), axes=(-1,), keepdims=False),
            _on(_a(2, 3, 4, draw=draw), axes=(0, 2)),
            _on(_a(2, 3, 4, draw=draw), axes=(1, 2), keepdims=False),
            _on(_a(2, 3, draw=draw)),
            _on(_a(2, 3, 4, draw=draw), keepdims=False),
        ]

    names = ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_l2")
    images = ((2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 3, 3))
    pools = [
        _on(_a(2, 3, 6), kernel=(2,), strides=(2,)),
        _on(_a(2, 3, 5, 6), kernel=(2, 3), strides=(1, 2), pads=(1, 0, 0, 1)),
        _on(_a(2, 3, 6), kernel=(3,), strides=(2,), ceil_mode=True),
    ]
    return {
        **{name: reductions() for name in names},
        "reduce_prod": reductions("nonzero"),
        "global_average_pool": [_on(_a(*shape)) for shape in images],
        "global_max_pool": [_on(_a(*shape)) for shape in images],
        "average_pool": [*pools, _on(_a(2, 3, 6), kernel=(2,), pads=(1, 1), count_include_pad=True)],
        "max_pool": [*pools, _on(_a(2, 3, 6), kernel=(2,), dilations=(2,))],
    }


def _attention() -> dict[str, list[Instance]]:
    q, k, v = _a(2, 2, 3, 4), _a(2, 2, 5, 4), _a(2, 2, 5, 3)
    grouped = _a(2, 4, 3, 4), _a(2, 2, 5, 4), _a(2, 2, 5, 3)
    return {
        "attention": [
            _on(q, k, v),
            _on(*grouped),
            _on(_a(1, 3, 4, 2), _a(1, 1, 4, 2), _a(1, 1, 4, 2), causal=True),
            _on(q, k, v, _a(2, 1, 1, 5), scale=0.3),
            _on(*grouped, _a(3, 5)),
            _on(q, k, v, _a(2, 2, 3, 5)),
            _on(
                q,
                k,
                v,
                Operand((2, 1, 3, 5), draw=np.tri(3, 5, 2, bool)[None, None].repeat(2, 0), dtype="bool"),
            ),
            _on(_a(2, 2, 4, 4), _same(0), _same(0)),
            _on(q, k, v, safe=True),
            _on(q, k, v, Operand((3, 5), draw=np.tri(3, 5, -1, bool), dtype="bool"), safe=True),
            _on(q, k, v, softcap=0.7, scale=0.5),
            _on(*grouped, _a(3, 5), softcap=1.5),
            _on(q, k, v, None, _c(2)),
            _on(*grouped, _a(3, 5), _a(4), softcap=1.5),
            _on(_a(1, 3, 4, 2), _a(1, 1, 4, 2), _a(1, 1, 4, 2), None, _c(3), causal=True),
            _on(q, k, v, _a(2, 2, 3, 5), _a(2)),
        ],
        "rope": [
            _on(_a(2, 3, 4), _a(3, 4), _a(3, 4)),
            _on(_a(2, 3, 5, 6), _c(5, 6), _c(5, 6), interleaved=True),
            _on(_a(2, 3, 5, 4), _a(2, 1, 5, 4), _a(2, 1, 5, 4)),
            _on(_a(3, 4), _c(4), _c(4)),
        ],
    }


def _rotation() -> dict[str, list[Instance]]:
    signs = Constant.of(np.array([1.0, -1.0, -1.0, 1.0], np.float32), "f32")
    return {
        "hadamard": [
            _on(_a(3, 4)),
            _on(_a(3, 4), transpose=True, signs=signs),
            _on(_a(2, 3, 4), block=2, signs=signs),
            _on(_a(2, 12, 3), axis=1, transpose=True),
            _on(_a(2, 4, 3), axis=-2, block=2),
        ],
    }


def _scan() -> dict[str, list[Instance]]:
    def scan(batch: int, channels: int, states: int, length: int, *more: Operand, constant: bool = True) -> Instance:
        long, state = _a(batch, channels, length), _a(batch, states, length)
        step = _a(batch, channels, length, draw=np.linspace(0.1, 0.9, batch * channels * length).reshape(long.shape))
        decay = Operand(
            (channels, states), constant, draw=-np.linspace(0.2, 2.0, channels * states).reshape(channels, -1)
        )
        return _on(long, step, decay, state, state, *more)

    return {
        "selective_scan": [
            scan(2, 3, 4, 5, _c(3)),
            scan(2, 4, 3, 5),
            scan(1, 3, 2, 4, _a(3), constant=False),
            scan(3, 2, 1, 4, _c(2)),
        ]
    }


def _quantization() -> dict[str, list[Instance]]:
    codes = _c(3, 4, draw="integer", dtype="i8")
    ids = _c(3, 4, draw=(np.arange(12) % 3).reshape(3, 4).astype(numpy_dtype("u2")), dtype="u2")
    return {
        "quantize": [
            _on(_a(3, 4), _c(draw="positive"), dtype="i8"),
            _on(_a(3, 4), _c(4, draw="positive"), _c(4, draw="integer", dtype="u8"), axis=1),
            _on(_a(3, 6), _c(3, 2, draw="positive"), _c(3, 2, draw="integer", dtype="u4"), axis=1, block=4, dtype="u4"),
            _on(_a(3, 4), _c(3, 1, draw="positive"), dtype="f4e2m1"),
        ],
        "dynamic_quantize": [
            _on(_a(3, 4)),
            _on(_a(3, 4), granularity="token"),
            _on(_a(3, 4), symmetric=True),
            _on(_a(3, 7), granularity="group", block=4, dtype="i4", symmetric=True),
            _on(_a(3, 8), granularity="group", block=4, dtype="f4e2m1", scale="f8e8m0", rule="even"),
            _on(_a(3, 8), _c(draw="positive"), granularity="group", block=4, dtype="f4e2m1", scale="f8e4m3fn"),
            _on(_a(2, 3, 4), granularity="token", dtype="f8e4m3fn"),
        ],
        "dequantize": [
            _on(codes, _c(4, draw="positive"), axis=1),
            _on(codes, _c(3, draw="positive"), _c(3, draw="integer", dtype="i8"), axis=0),
            _on(codes, _c(draw="positive")),
            _on(codes, _c(3, 1, draw="positive")),
            _on(codes, _c(3, 2, draw="positive"), _c(3, 2, draw="integer", dtype="i8"), axis=1, block=3),
            _on(_c(2, 6, 3, draw="integer", dtype="i4"), _c(2, 2, 3, draw="positive", dtype="f16"), axis=1, block=3,
                dtype="f32"),
            _on(codes, _c(3, 2, draw="power", dtype="f8e8m0"), axis=-1, block=2, dtype="f32"),
        ],
        "dequantize_split": [
            _on(codes, ids, _c(3, 4, draw="positive"), axis=1),
            _on(codes, ids, _c(3, 3, 2, draw="positive"), _c(3, 3, 2), axis=1, block=2),
            _on(codes, ids, _c(3, 3, 2, draw="positive"), axis=1, block=2, index=1),
            _on(_c(3, 4), ids, _c(3, draw="equal")),
        ],
    }  # fmt: skip


@cache
def instances() -> dict[str, list[Instance]]:
    """The instances of every op, by name."""
    table: dict[str, list[Instance]] = {}
    for family in (
        _elementwise,
        _structural,
        _contraction,
        _normalisation,
        _reduction,
        _attention,
        _rotation,
        _scan,
        lookups,
        _quantization,
    ):
        table.update(family())
    return table
