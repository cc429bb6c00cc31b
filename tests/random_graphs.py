"""Random graphs from lists of small integers, so that hypothesis can shrink them.

Branches, joins, concat, split, transposes, head splits, broadcasts, gathers, norms, products, attention,
weights that are read more than once, tensors that are written and read on several axes at once, convolutions and
batch norms with constants or computed kernels and gains, rotary tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.types import TensorType

Step = tuple[int, int, int, int]
ROWS, WIDTH = 3, 6

steps = st.lists(
    st.tuples(st.integers(0, 47), st.integers(0, 7), st.integers(0, 7), st.integers(0, 3)), min_size=2, max_size=12
)


class _Maker:
    def __init__(self, seed: int) -> None:
        self.graph = Graph("random")
        self.rng = np.random.default_rng(seed)
        self.live: list[Value] = [self.graph.add_input("x", TensorType("f32", (2, ROWS, WIDTH)))]
        self.ids = self.graph.add_input("ids", TensorType("i64", (2, ROWS)))
        self.weights: dict[tuple[int, int], list[Value]] = {}
        self.vectors: dict[int, Value] = {}
        self.live.append(self.linear(self.live[0], WIDTH, 0))

    def constant(self, name: str, data: np.ndarray | Sequence[int]) -> Value:
        array = np.asarray(data)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        return self.graph.add_constant(self.graph.fresh_name(name), Constant.of(array))

    def normal(self, name: str, *shape: int) -> Value:
        return self.constant(name, self.rng.normal(size=shape) + 0.1)

    def op(self, name: str, *operands: Value | None, **attributes: object) -> Value:
        return self.graph.append(get(name), operands, attributes).result  # type: ignore[arg-type]

    def linear(self, x: Value, outputs: int, reuse: int) -> Value:
        assert x.shape is not None
        inputs = int(x.shape[-1])  # type: ignore[arg-type]
        known = self.weights.setdefault((outputs, inputs), [])
        weight = known[0] if reuse == 3 and known else self.normal("weight", outputs, inputs)
        known.append(weight)
        bias = self.normal("bias", outputs) if reuse != 2 else None
        return self.op("linear", x, weight, bias)

    def vector(self, size: int, reuse: int) -> Value:
        """A constant vector; with `reuse` 3 one that other nodes may read as well."""
        if reuse == 3 and size in self.vectors:
            return self.vectors[size]
        self.vectors[size] = made = self.normal("vector", size)
        return made

    def across(self, x: Value, axis: int, outputs: int, reuse: int) -> Value:
        """A linear over another axis than the last."""
        assert x.rank is not None
        perm = [i for i in range(x.rank) if i != axis] + [axis]
        y = self.linear(self.op("transpose", x, perm=tuple(perm)), outputs, reuse)
        return self.op("transpose", y, perm=tuple(perm.index(i) for i in range(x.rank)))

    def pick(self, index: int, good: Callable[[Value], bool] = lambda v: True) -> Value | None:
        found = [v for v in self.live if good(v)]
        return found[-1 - index % len(found)] if found else None

    def step(self, step: Step) -> None:
        kind, a, b, c = step
        x = self.pick(a)
        assert x is not None and x.shape is not None
        shape = tuple(int(d) for d in x.shape)  # type: ignore[arg-type]
        last = len(shape) - 1
        same = self.pick(b, lambda v: v.shape == x.shape)
        assert same is not None
        made: list[Value] = []
        match kind:
            case 0 | 1 | 2 | 3 | 4:
                made = [self.linear(x, WIDTH, c)]
            case 5 | 6:
                made = [self.op("add", x, same)]
            case 7 | 8:
                made = [self.op("mul", x, same)]
            case 9:
                made = [self.op("sub", x, same)]
            case 10:
                made = [self.op(("relu", "gelu", "silu", "abs")[c], x)]
            case 11:
                made = [self.op(("relu", "tanh", "neg", "sigmoid")[c], x)]
            case 12 | 13:
                axis = b % len(shape)
                made = [self.op("concat", x, same, axis=axis)]
            case 14:
                axis = b % len(shape)
                if shape[axis] > 1:
                    sizes = (1 + c % (shape[axis] - 1), shape[axis] - 1 - c % (shape[axis] - 1))
                    made = list(self.graph.append(get("split"), [x], {"axis": axis, "sizes": sizes}).results)
            case 15 | 16:
                perm = list(range(len(shape)))
                i, j = b % len(shape), c % len(shape)
                perm[i], perm[j] = perm[j], perm[i]
                made = [self.op("transpose", x, perm=tuple(perm))]
            case 17 | 18:
                if shape[last] % 2 == 0 and len(shape) < 5:
                    heads = (*shape[:last], 2, shape[last] // 2)
                    made = [self.op("reshape", x, self.constant("shape", heads))]
            case 19 | 20:
                if len(shape) > 2:
                    merged = (*shape[: last - 1], shape[last - 1] * shape[last])
                    made = [self.op("reshape", x, self.constant("shape", merged))]
            case 21:
                index = self.rng.integers(0, shape[last], 1 + b % shape[last])
                made = [self.op("gather", x, self.constant("index", index), axis=last)]
            case 22:
                bounds = [self.constant("bound", [v]) for v in (-1, -shape[last] - 1, last, -1)]
                made = [self.op("slice", x, *bounds)]
            case 23:
                made = [self.op("add", self.normal("c", *((shape[last],) if c else ())), x)]
            case 24:
                made = [self.op("mul", x, self.normal("c", *((shape[last],) if c else ())))]
            case 25 | 26:
                vectors = [self.normal(name, shape[last]) for name in ("gain", "beta")]
                made = [self.op("layer_norm", x, *vectors, eps=1e-5)]
            case 27:
                gain = self.normal("gain", shape[last]) if c else None
                made = [self.op("rms_norm", x, gain, eps=1e-5)]
            case 28:
                made = [self.op("softmax", x, axis=-1)]
            case 29 | 30:
                turned = self.op("transpose", same, perm=(*range(last - 1), last, last - 1)) if len(shape) > 1 else None
                if turned is not None:
                    scores = self.op("softmax", self.op("matmul", x, turned), axis=-1)
                    made = [self.op("matmul", scores, same)]
            case 31:
                made = [self.op("embedding", self.normal("table", 7, WIDTH), self.ids)]
            case 32:
                made = [self.op("reduce_mean", x, axes=(b % len(shape),), keepdims=True)]
            case 33:
                other = self.pick(b, lambda v: v.rank == x.rank)
                if other is not None and _broadcasts(x, other):
                    made = [self.op("mul" if c % 2 else "add", x, other)]
            case 34:
                made = [self.op("clip", x, self.constant("low", np.array(-1.0)), self.constant("high", np.array(1.0)))]
            case 35:
                made = [self.op("div", x, self.op("exp", self.op("tanh", same)))]
            case 36:
                target = (2, *shape)
                made = [self.op("expand", x, self.constant("shape", target))] if len(shape) < 4 else []
            case 37:
                made = [self.op("unsqueeze", x, axes=(b % (len(shape) + 1),))] if len(shape) < 5 else []
            case 38:
                if len(shape) > 1:
                    made = [self.op("matmul", x, self.normal("matrix", shape[last], 4))]
            case 39:
                made = [self.op("max", x, same)]
            case 40 | 41:
                if len(shape) < 5:
                    sizes = ((2, 3), (3, 2), (2, 2), (4, 1))[c]
                    wide = self.linear(x, sizes[0] * sizes[1], b % 4)
                    made = [self.op("reshape", wide, self.constant("shape", (*shape[:last], *sizes)))]
            case 42:
                made = [self.across(x, b % len(shape), (2, 3, 4, shape[b % len(shape)])[c], c)]
            case 43:
                turned = self.op("transpose", same, perm=(*range(last - 1), last, last - 1)) if len(shape) > 1 else None
                made = [self.op("matmul", x, turned)] if turned is not None else []
            case 44:
                if len(shape) > 1:
                    size = shape[1]
                    gain = self.vector(size, b % 4)
                    gain = self.op("neg", gain) if c == 1 else gain
                    variance = self.constant("variance", np.exp(self.rng.normal(size=size)))
                    made = [self.op("batch_norm", x, gain, self.vector(size, c), self.vector(size, b % 4), variance)]
            case 45:
                if len(shape) == 3:
                    groups = shape[1] if c else 1
                    kernel = self.normal("kernel", shape[1] * (1 + c // 3), shape[1] // groups, 1)
                    kernel = self.op("mul", kernel, self.normal("scale", 1)) if b == 7 else kernel
                    made = [self.op("conv", x, kernel, None, groups=groups)]
            case 46:
                if shape[last] % 2 == 0:
                    tables = (self.vector(shape[last], b % 4), self.vector(shape[last], c))
                    made = [self.op("rope", x, *tables, interleaved=bool(c % 2))]
            case _:
                made = [self.op("add" if c % 2 else "mul", x, self.vector(shape[last], 3))]
        small = [v for v in made if v.shape is not None and np.prod(v.shape) <= 4096]  # type: ignore[arg-type]
        self.live += [v for v in small if v.rank]


def _broadcasts(a: Value, b: Value) -> bool:
    assert a.shape is not None and b.shape is not None
    return all(x == y or 1 in (x, y) for x, y in zip(a.shape, b.shape, strict=True))


def random_graph(plan: Sequence[Step], seed: int) -> Graph:
    """The graph of a plan; every value that nothing reads goes through a linear to an output."""
    maker = _Maker(seed)
    for step in plan:
        maker.step(step)
    loose = [v for v in maker.live if not v.users and v.producer is not None][-3:]
    for number, value in enumerate(loose):
        out = maker.linear(value, 2, 0)
        maker.graph.add_output(f"y{number}", out)
    return maker.graph
