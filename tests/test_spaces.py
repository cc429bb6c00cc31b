"""Channel spaces: which tensors one holds, how it is cut into heads, and what blocks it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_blocks import HEADS, HIDDEN, SIZE, WIDTH, heads, linear, merged, names, post_norm, pre_norm
from exercise import exercise
from patterns import Build

from planish.capture.from_onnx import from_onnx
from planish.ir import ops
from planish.ir.graph import Graph, Value
from planish.ir.ops.base import ACTS, Act
from planish.ir.spaces import Space, analyse
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import assets

PER_HEAD = np.repeat(np.arange(HEADS), SIZE).tolist()


def at(graph: Graph, value: Value, act: Act, axes: tuple[int, ...] | None = None) -> Space:
    """The space of a value's last axis."""
    assert value.rank is not None
    (space,) = analyse(graph).at(value, axes or (value.rank - 1,), act)
    return space


def constants(space: Space) -> dict[str, tuple[tuple[int, ...], int]]:
    return {m.value.name: (m.axes, m.variance) for m in space.maximal_constants if m.value is not None}


def reader(graph: Graph, weight: str) -> Value:
    """The result of the linear with that weight."""
    return graph.values[weight].users[0].result


def written(graph: Graph, weight: str) -> Value:
    value = graph.values[weight].users[0].operands[0]
    assert value is not None
    return value


def blockers(space: Space) -> set[str]:
    return {str(b) for b in space.blockers}


# -- a block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [Act.PERMUTE, Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR])
def test_values_to_output(act: Act) -> None:
    """From the value linear through attention to the output linear, each head by itself where channels mix."""
    graph = pre_norm()
    space = at(graph, reader(graph, "v.weight"), act)
    assert space.admitted
    assert space.size == WIDTH
    mixing = act not in (Act.SCALE, Act.SHIFT)
    assert (space.labels.tolist() if space.labels is not None else None) == (PER_HEAD if mixing else None)
    assert [b.tolist() for b in space.blocks] == ([[0, 1, 2, 3], [4, 5, 6, 7]] if mixing else [list(range(WIDTH))])
    if act is Act.SHIFT:
        assert constants(space) == {"v.bias": ((0,), 1)}
        assert [f.node.result for f in space.folds] == [reader(graph, "o.weight")]
        return
    assert constants(space) == {"v.weight": ((0,), 1), "v.bias": ((0,), 1), "o.weight": ((1,), -1)}
    assert names([m.value for m in space.producers]) == {"v.weight", "v.bias"}
    assert names([m.value for m in space.consumers]) == {"o.weight"}
    assert any(m.value.producer.op.name == "attention" and m.axes == (1, 3) for m in space.activations)


@pytest.mark.parametrize("act", [Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR])
def test_queries_and_keys_are_dual(act: Act) -> None:
    graph = pre_norm()
    space = at(graph, reader(graph, "q.weight"), act)
    assert space is not None and space.admitted
    # orthogonal acts are their own inverse transposes
    other = -1 if act in (Act.SCALE, Act.LINEAR) else 1
    assert constants(space) == {
        "q.weight": ((0,), 1),
        "q.bias": ((0,), 1),
        "k.weight": ((0,), other),
        "k.bias": ((0,), other),
    }
    assert (space.labels is None) is (act is Act.SCALE)


def test_a_shift_of_keys_is_free_and_one_of_queries_is_not() -> None:
    graph = pre_norm()
    keys, queries = (at(graph, reader(graph, f"{c}.weight"), Act.SHIFT) for c in "kq")
    assert keys.admitted
    assert constants(keys) == {"k.bias": ((0,), 1)}
    assert blockers(queries) == {"attention %attention: a shift changes the scores"}


def test_the_residual_and_who_blocks_it() -> None:
    graph = pre_norm()
    stream = reader(graph, "first.weight")
    norms = [n.result.name for n in graph.nodes if n.op.name == "layer_norm"]
    ends = {"first.weight": ((0,), 1), "o.weight": ((0,), 1), "down.weight": ((0,), 1), "last.weight": ((1,), -1)}
    for act, reason in {
        Act.SCALE: "it divides by the scale of its input",
        Act.ROTATE: "it subtracts the mean over the channels: centre it first",
    }.items():
        space = at(graph, stream, act)
        assert blockers(space) == {f"layer_norm %{name}: {reason}" for name in norms}
        assert constants(space).items() >= ends.items()
    permutation = at(graph, stream, Act.PERMUTE)
    assert permutation.admitted
    norm_readers = {"q.weight", "k.weight", "v.weight", "up.weight", "last.weight"}
    assert names([m.value for m in permutation.consumers]) == norm_readers
    assert {"norm1.gain", "norm1.bias", "norm2.gain", "norm2.bias"} <= names([m.value for m in permutation.producers])


def test_the_source_of_a_blocker_is_named() -> None:
    b = Build()
    h = linear(b, b.input("x", "f32[2, 8]"), 8, "a")
    graph = b.output(b.graph.append(ops.get("tanh"), [h], source="/layer/Tanh").result)
    assert blockers(at(graph, h, Act.SCALE)) == {
        "tanh %tanh (/layer/Tanh): its result is not proportional to its operand"
    }


def test_a_stream_that_plain_norms_read_rotates() -> None:
    """RMSNorm without a gain commutes with every rotation, but not with a scale."""
    b = Build()
    x = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "first")
    h = b("add", x, linear(b, b("gelu", linear(b, b("rms_norm", x), 12, "up")), 8, "down"))
    graph = b.output(linear(b, b("rms_norm", h), 8, "last"))
    space = at(graph, x, Act.ROTATE)
    assert space.admitted and space.labels is None
    readers = {"up.weight", "last.weight"}
    assert names([m.value for m in space.consumers]) == readers
    assert not at(graph, x, Act.SCALE).admitted
    (linears,) = analyse(graph).at(x, (2,), Act.LINEAR)
    assert {v.reason for v in linears.blockers} != set()


def test_a_post_norm_shift_rides_on_the_other_addend() -> None:
    """norm(x + f(x)) with x shifted: f's output takes -t, so that the sum is as it was."""
    graph = post_norm()
    space = at(graph, written(graph, "q.weight"), Act.SHIFT)
    assert space.admitted
    assert constants(space) == {"norm0.bias": ((0,), 1), "o.bias": ((0,), -1)}
    assert {f.node.result for f in space.folds} == {reader(graph, f"{c}.weight") for c in "qkv"}


def test_hidden_channels() -> None:
    """Through gelu only a permutation passes; through relu a positive scale does too."""
    graph = pre_norm()
    hidden = reader(graph, "up.weight")
    space = at(graph, hidden, Act.PERMUTE)
    assert (space.size, space.labels, space.admitted) == (HIDDEN, None, True)
    assert constants(space) == {"up.weight": ((0,), 1), "up.bias": ((0,), 1), "down.weight": ((1,), -1)}
    for act in (Act.SCALE, Act.SHIFT, Act.ROTATE):
        assert all(b.node is not None and b.node.op.name == "gelu" for b in at(graph, hidden, act).blockers)
        assert not at(graph, hidden, act).admitted
    graph = pre_norm(activation="relu")
    space = at(graph, reader(graph, "up.weight"), Act.SCALE)
    assert space.admitted and space.positive


def test_the_border_blocks() -> None:
    graph = pre_norm()
    for act in (Act.PERMUTE, Act.SCALE, Act.SHIFT, Act.ROTATE):
        assert blockers(at(graph, graph.values["x"], act)) == {"%x: graph input"}
        last = reader(graph, "last.weight")
        assert blockers(at(graph, last, act)) == {f"%{last.name}: graph output"}


def test_linear_only_where_rotate() -> None:
    graph = pre_norm()
    spaces = analyse(graph)
    rotations = {s.key() for s in spaces.admitted(Act.ROTATE)}
    linears = {s.key() for s in spaces.of(Act.LINEAR)}
    assert linears == rotations
    assert len(linears) == 2


def test_answers_are_kept() -> None:
    spaces = analyse(pre_norm())
    assert spaces.of(Act.SCALE) is spaces.of(Act.SCALE)
    assert spaces.admitted(Act.SCALE) == [s for s in spaces.of(Act.SCALE) if s.admitted]
    x = spaces.graph.values["x"]
    assert spaces.at(x, (0,), Act.SCALE) == []
    (one,) = spaces.at(x, (2,), Act.SCALE)
    assert one.key() == frozenset({("x", (2,))})


def test_the_same_answers_every_time() -> None:
    def text(graph: Graph) -> list[str]:
        spaces = analyse(graph)
        return [
            f"{act.value} {s.size} {s.labels} {s.positive} {sorted(map(str, s.key()))} {constants(s)} {blockers(s)}"
            for act in ACTS
            for s in spaces.of(act)
        ]

    assert text(pre_norm()) == text(pre_norm())
    assert text(pre_norm()) == text(pre_norm().clone())


# -- cuts ----------------------------------------------------------------------------------------


def test_concat_cuts() -> None:
    b = Build()
    x = b.input("x", "f32[2, 3, 8]")
    one, two = linear(b, x, 2, "one"), linear(b, x, 3, "two")
    both = b("concat", one, two, axis=2)
    graph = b.output(linear(b, both, 4, "both"), linear(b, two, 4, "only"))
    for act in (Act.SCALE, Act.ROTATE):
        spaces = analyse(graph).at(both, (2,), act)
        assert [s.size for s in spaces] == [2, 3]
        assert all(s.admitted for s in spaces)
        first, second = (
            {m.value.name: m.atoms.tolist() for m in s.maximal_constants if m.atoms is not None} for s in spaces
        )
        assert first == {"both.weight": [0, 1, -1, -1, -1]}
        assert second == {"both.weight": [-1, -1, 0, 1, 2]}
        assert constants(spaces[1])["only.weight"] == ((1,), -1)
    assert all(exercise(graph, seed=0, tolerance=1e-12)[a] >= 2 for a in ACTS)


def split(b: Build, x: Value, *sizes: int) -> tuple[Value, ...]:
    return b.graph.append(ops.get("split"), [x], {"axis": 2, "sizes": sizes}).results


def test_split_cuts() -> None:
    """One part is read by a tanh: only its channels are blocked."""
    b = Build()
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 6, "a")
    free, bent = split(b, h, 4, 2)
    graph = b.output(linear(b, free, 3, "r"), linear(b, b("tanh", bent), 3, "s"))
    spaces = analyse(graph).at(h, (2,), Act.SCALE)
    assert [(s.size, s.admitted) for s in spaces] == [(4, True), (2, False)]
    rotations = analyse(graph).at(h, (2,), Act.ROTATE)
    assert [(s.size, s.admitted) for s in rotations] == [(4, True), (2, False)]
    exercise(graph, seed=0, tolerance=1e-12)


def test_fused_queries_keys_and_values() -> None:
    """One linear for all three: the values' rows are a space of their own."""
    b = Build()
    fused = linear(b, b.input("x", "f32[2, 3, 8]"), 3 * WIDTH, "qkv")
    q, k, v = split(b, fused, WIDTH, WIDTH, WIDTH)
    o = b("attention", *(heads(b, t) for t in (q, k, v)))
    graph = b.output(linear(b, merged(b, o), WIDTH, "o"))
    for act in (Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR):
        (values,) = [s for s in analyse(graph).of(act) if "o.weight" in names([m.value for m in s.consumers])]
        assert values.admitted
        atoms = {m.value.name: m.atoms for m in values.maximal_constants}
        assert atoms["o.weight"] is None
        assert atoms["qkv.weight"].tolist() == [-1] * 2 * WIDTH + list(range(WIDTH))
    (dual,) = [s for s in analyse(graph).admitted(Act.ROTATE) if "o.weight" not in constants(s)]
    atoms = {m.value.name: m.atoms for m in dual.maximal_constants}
    assert atoms["qkv.weight"].tolist() == [*range(WIDTH), *range(WIDTH)] + [-1] * WIDTH
    assert dual.labels is not None and dual.labels.tolist() == PER_HEAD
    exercise(graph, seed=0, tolerance=1e-12)


@pytest.mark.parametrize("spelling", ["op", "expand"])
def test_shared_key_and_value_heads(spelling: str) -> None:
    """Four query heads, two key heads: a channel of a key head is there twice on the other side."""
    b = Build()
    x = b.input("x", "f32[2, 3, 8]")
    q = heads(b, linear(b, x, 8, "q"), 4, 2)
    k, v = (heads(b, linear(b, x, 4, c), 2, 2) for c in "kv")
    if spelling == "expand":

        def repeated(t: Value) -> Value:
            wide = b("expand", b("unsqueeze", t, axes=(2,)), b.constant(np.array([2, 2, 2, 3, 2])))
            return b("reshape", wide, b.constant(np.array([2, 4, 3, 2])))

        k, v = repeated(k), repeated(v)
    graph = b.output(linear(b, merged(b, b("attention", q, k, v)), 8, "o"))
    twice = [0, 1, 0, 1, 2, 3, 2, 3]
    for act in (Act.SCALE, Act.ROTATE, Act.LINEAR):
        values, keys = (at(graph, reader(graph, f"{c}.weight"), act) for c in "vk")
        for space, wide, narrow in ((values, "o.weight", "v.weight"), (keys, "q.weight", "k.weight")):
            assert space.admitted
            assert space.size == 4
            atoms = {m.value.name: m.atoms for m in space.maximal_constants}
            assert atoms[wide].tolist() == twice
            assert atoms[narrow] is None
            assert (space.labels.tolist() if space.labels is not None else None) == (
                None if act is Act.SCALE else [0, 0, 1, 1]
            )
    counts = exercise(graph, seed=0, tolerance=1e-12)
    assert all(counts[a] >= 2 for a in (Act.SCALE, Act.ROTATE, Act.LINEAR))


def fused_heads(b: Build, layout: str) -> tuple[Value, Value, Value]:
    """q, k, v [2, HEADS, 3, SIZE] out of one linear, in the orders in which models lay its rows out."""
    fused = linear(b, b.input("x", "f32[2, 3, 8]"), 3 * WIDTH, "qkv")
    if layout == "kind-head":  # [3, H, d]
        wide = b("transpose", b("reshape", fused, np.array([2, 3, 3, HEADS, SIZE])), perm=(2, 0, 3, 1, 4))
        ones = b.graph.append(ops.get("split"), [wide], {"axis": 0, "sizes": (1, 1, 1)}).results
        parts = [b("squeeze", part, axes=(0,)) for part in ones]
    elif layout == "head-kind":  # [H, 3, d], one position taken at a time
        wide = b("transpose", b("reshape", fused, np.array([2, 3, HEADS, 3, SIZE])), perm=(0, 2, 1, 3, 4))
        parts = [b("gather", wide, b.constant(np.array(i)), axis=3) for i in range(3)]
    elif layout == "shared":  # [H + 2, d]: one key head and one value head behind the query heads
        wide = b("reshape", fused, np.array([2, 3, HEADS + 4, SIZE]))
        cut = [b("slice", wide, np.array([0]), np.array([HEADS]), np.array([2]))]
        cut += [b("gather", wide, b.constant(np.array([i])), axis=2) for i in (HEADS, HEADS + 1)]
        parts = [b("transpose", part, perm=(0, 2, 1, 3)) for part in cut]
    elif layout == "head-kind-slice":
        wide = b("reshape", fused, np.array([2, 3, HEADS, 3, SIZE]))
        cut = [b("slice", wide, np.array([i]), np.array([i + 1]), np.array([3])) for i in range(3)]
        parts = [b("transpose", b("squeeze", part, axes=(3,)), perm=(0, 2, 1, 3)) for part in cut]
    else:  # [H, 3 d], cut into three
        wide = b("transpose", b("reshape", fused, np.array([2, 3, HEADS, 3 * SIZE])), perm=(0, 2, 1, 3))
        parts = b.graph.append(ops.get("split"), [wide], {"axis": 3, "sizes": (SIZE,) * 3}).results
    return parts[0], parts[1], parts[2]


@pytest.mark.parametrize("layout", ["kind-head", "head-kind", "head-kind-slice", "head-wide"])
def test_a_fused_weight_holds_a_transform_and_its_inverse(layout: str) -> None:
    """Queries and keys are dual although one weight makes both; the values are free of them."""
    b = Build()
    graph = b.output(linear(b, merged(b, b("attention", *fused_heads(b, layout))), WIDTH, "o"))
    for act in (Act.SCALE, Act.LINEAR):
        (dual,) = [s for s in analyse(graph).admitted(act) if "o.weight" not in constants(s)]
        rows = {m.variance: m.atoms for m in dual.maximal_constants if m.value.name == "qkv.weight"}
        assert sorted(rows) == [-1, 1]
        assert sorted(rows[1][rows[1] >= 0]) == sorted(rows[-1][rows[-1] >= 0]) == list(range(WIDTH))
        (values,) = [s for s in analyse(graph).admitted(act) if "o.weight" in constants(s)]
        assert sum((m.atoms >= 0).sum() for m in values.maximal_constants if m.value.name == "qkv.weight") == WIDTH
        assert (None if dual.labels is None else dual.labels.tolist()) == (None if act is Act.SCALE else PER_HEAD)
    counts = exercise(graph, seed=0, tolerance=1e-12)
    assert all(counts[a] >= 2 for a in (Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR))


def test_rows_of_a_sequence_are_no_stack() -> None:
    """The first token of a sequence carries what all tokens carry: its axis was never a part of the channels."""
    b = Build()
    hidden = linear(b, b.input("x", "f32[2, 3, 8]"), WIDTH, "up")
    first = b("gather", hidden, b.constant(np.array(0)), axis=1)
    graph = b.output(linear(b, first, 4, "head"), linear(b, hidden, 4, "other"))
    space = at(graph, hidden, Act.SCALE)
    assert space.admitted
    assert set(constants(space)) == {"up.weight", "up.bias", "head.weight", "other.weight"}
    exercise(graph, seed=0, tolerance=1e-12)


def test_the_one_key_head_of_many_queries() -> None:
    """Position -2 of the fused heads are keys, -1 values: neither ties the query heads' rows."""
    b = Build()
    graph = b.output(linear(b, merged(b, b("attention", *fused_heads(b, "shared"))), WIDTH, "o"))
    (values,) = [s for s in analyse(graph).admitted(Act.ROTATE) if "o.weight" in constants(s)]
    assert values.size == SIZE
    free = [s for s in analyse(graph).admitted(Act.LINEAR) if "o.weight" not in constants(s)]
    (dual,) = [s for s in free if {m.variance for m in s.constants} == {-1, 1}]
    assert dual.size == SIZE
    exercise(graph, seed=0, tolerance=1e-12)


@pytest.mark.parametrize("stream", ["chain", "residual"])
def test_a_batch_norm_stands_between_two_scales(stream: str) -> None:
    """Its gain takes the scale of its input and the one of its result, each by itself; in a residual they cancel."""
    b = Build()
    first = linear(b, b.input("x", "f32[3, 8]"), WIDTH, "first")
    vectors = [b.random(WIDTH, name=n) for n in ("gain", "bias", "mean")]
    variance = b.constant(np.exp(b.rng.normal(size=WIDTH)), name="variance")
    normed = b("batch_norm", first, *vectors, variance)
    last = b("add", first, normed) if stream == "residual" else normed
    graph = b.output(linear(b, last, WIDTH, "last"))
    ahead, behind = at(graph, first, Act.SCALE), at(graph, normed, Act.SCALE)
    assert ahead.admitted
    assert behind.admitted
    gains = sorted(m.variance for s in (ahead, behind) for m in s.constants if m.value.name == "gain")
    if stream == "chain":
        assert constants(ahead)["gain"] == ((0,), -1)
        assert constants(behind)["gain"] == ((0,), 1)
    else:
        assert gains == [-1, -1, 1, 1]
    assert exercise(graph, seed=0, tolerance=1e-12)[Act.SCALE] >= 2 - (stream == "residual")


def test_a_value_that_meets_its_own_inverse() -> None:
    """One tensor as queries and keys: only factors of +-1 would do."""
    b = Build()
    q = heads(b, linear(b, b.input("x", "f32[2, 3, 8]"), WIDTH, "qk"))
    v = heads(b, linear(b, b.graph.inputs[0], WIDTH, "v"))
    graph = b.output(linear(b, merged(b, b("attention", q, q, v)), WIDTH, "o"))
    space = at(graph, q, Act.SCALE, (1, 3))
    assert {blocker.reason for blocker in space.blockers} == {"it meets its own inverse"}
    assert at(graph, q, Act.ROTATE, (1, 3)).admitted
    exercise(graph, seed=0, tolerance=1e-12)


@pytest.mark.parametrize("tables", ["constants", "computed"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs_change_places_with_their_angles(tables: str, interleaved: bool) -> None:
    """A permutation of q and k moves whole pairs, the same in every head, and the tables with them."""
    b = Build()
    x = b.input("x", "f32[2, 3, 8]")
    q, k, v = (heads(b, linear(b, x, WIDTH, c)) for c in "qkv")
    angles: list[Value] = []
    if tables == "constants":
        angle = b.rng.normal(size=(3, SIZE // 2))
        wide = np.repeat(angle, 2, 1) if interleaved else np.concatenate([angle, angle], 1)
        angles = [b.constant(f(wide), name="table") for f in (np.cos, np.sin)]
    else:
        frequency = b.random(SIZE // 2, name="frequency")
        half = b("mul", b.input("position", "f32[3, 1]"), frequency)
        if interleaved:
            pair = b("unsqueeze", half, axes=(2,))
            both = b("reshape", b("concat", pair, pair, axis=2), np.array([3, SIZE]))
        else:
            both = b("concat", half, half, axis=1)
        angles = [b("cos", both), b("sin", both)]
    q, k = (b("rope", t, *angles, interleaved=interleaved) for t in (q, k))
    graph = b.output(linear(b, merged(b, b("attention", q, k, v)), WIDTH, "o"))
    space = at(graph, q, Act.PERMUTE, (1, 3))
    assert space.admitted
    assert space.size == SIZE // 2
    found = {m.value.name: m.atoms for m in space.maximal_constants}
    pairs = [0, 0, 1, 1] if interleaved else [0, 1, 0, 1]
    assert found["q.weight"].tolist() == pairs * HEADS
    assert ("frequency" in found) == (tables == "computed")
    factors = at(graph, q, Act.SCALE, (1, 3))
    assert factors.admitted
    assert factors.size == WIDTH // 2
    assert not at(graph, q, Act.ROTATE, (1, 3)).admitted
    exercise(graph, seed=0, tolerance=1e-12)


def test_attention_that_is_written_out_ties_its_heads() -> None:
    """A matmul asks for the contracted axis alone: what is found holds for every head alike, and is exact."""
    b = Build()
    x = b.input("x", "f32[2, 3, 8]")
    q, k, v = (heads(b, linear(b, x, WIDTH, c)) for c in "qkv")
    scores = b("matmul", q, b("transpose", k, perm=(0, 1, 3, 2)))
    graph = b.output(linear(b, merged(b, b("matmul", b("softmax", scores), v)), 8, "o"))
    for act in (Act.SCALE, Act.ROTATE, Act.LINEAR):
        space = at(graph, reader(graph, "v.weight"), act)
        assert space.admitted
        assert set(constants(space)) == {"v.weight", "v.bias", "o.weight"}
    exercise(graph, seed=0, tolerance=1e-12)


# -- ties ----------------------------------------------------------------------------------------


def test_tied_weights_are_one_space() -> None:
    """Two linears read one weight: what one of them cannot carry, neither can the other."""
    b = Build()
    x, shared = b.input("x", "f32[2, 8]"), b.random(4, 8, name="shared")
    one, two = b("linear", x, shared, b.random(4, name="b1")), b("linear", x, shared, b.random(4, name="b2"))
    graph = b.output(linear(b, one, 3, "r1"), linear(b, b("relu", two), 3, "r2"))
    space = at(graph, one, Act.SCALE)
    assert space.key() == at(graph, two, Act.SCALE).key()
    assert set(constants(space)) == {"shared", "b1", "b2", "r1.weight", "r2.weight"}
    assert space.positive  # by the relu behind the other reader
    assert not at(graph, one, Act.ROTATE).admitted
    assert at(graph, one, Act.SHIFT).admitted  # biases are not shared
    exercise(graph, seed=0, tolerance=1e-12)


def test_a_tied_table() -> None:
    """Embedding and head read one table: the stream's space holds both of its readers."""
    b = Build()
    table = b.random(16, 8, name="table")
    h = b("rms_norm", b("embedding", table, b.input("ids", "i64[2, 6]")), b.random(8, name="gain"))
    graph = b.output(b("linear", h, table))
    space = at(graph, h, Act.PERMUTE)
    assert space.admitted
    assert set(constants(space)) == {"table", "gain"}
    assert not any("table" in constants(s) for s in analyse(graph).admitted(Act.SCALE))
    exercise(graph, seed=0, tolerance=1e-12)


def test_a_dynamic_axis_is_left_alone() -> None:
    b = Build()
    x = b.input("x", "f32[2, n]")
    graph = b.output(b("matmul", x, b.input("w", "f32[n, 4]")))
    for act in ACTS:
        assert analyse(graph).at(x, (1,), act) == []
        assert {s.size for s in analyse(graph).of(act)} <= {2, 4}


def test_no_channels_no_spaces() -> None:
    b = Build()
    graph = b.output(b("relu", b.input("x", "f32[2, 8]")))
    assert all(analyse(graph).of(act) == [] for act in ACTS)


# -- a real encoder --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "attention"), [("dynamo", "sdpa"), ("legacy", "eager")])
def test_minilm(exporter: str, attention: str) -> None:
    graph, _ = Pipeline("raise").run(from_onnx(assets.minilm_onnx(exporter, attention)), validate=False)
    spaces = analyse(graph)
    layers, width, count = 6, 384, 12

    permutations = spaces.of(Act.PERMUTE)
    (residual,) = [s for s in permutations if not s.admitted]
    assert (residual.size, residual.labels) == (width, None)
    assert {b.reason for b in residual.blockers} == {"graph output"}
    assert all(b.node is None for b in residual.blockers)

    hidden = [s for s in permutations if s.size == 4 * width]
    assert len(hidden) == layers
    for space in hidden:
        assert space.admitted and space.labels is None
        assert len(space.producers) == 2 and len(space.consumers) == 1

    for act in (Act.PERMUTE, Act.ROTATE, Act.LINEAR, Act.SCALE):
        found = [s for s in spaces.admitted(act) if s.size == width]
        assert len(found) == 2 * layers
        values = [s for s in found if len(s.constants) == 3]
        duals = [s for s in found if len(s.constants) == 4]
        assert (len(values), len(duals)) == (layers, layers)
        for space in found:
            sizes = None if space.labels is None else np.bincount(space.labels).tolist()
            assert sizes == (None if act is Act.SCALE else [width // count] * count)
        if act in (Act.SCALE, Act.LINEAR):
            assert all(len(s.producers) == len(s.consumers) == 2 for s in duals)
