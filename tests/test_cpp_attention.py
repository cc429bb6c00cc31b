"""Attention in C++: against float64 with a derived bound, over forms, strides and sizes, and wrong on purpose.

The bound, u = 2^-24 (half: what rounding to bf16 adds, h = 2^-9 each time):

    score     d = (D + 8) u scale sum |q k|, half: 2 h scale sum |q k| unless q and k are bf16; and 8 u of its size for
              the cap and the mask
    weight    relative: w = 2 max d of the row + 32 u, half: 1e-4 + h
    result    sum p |v| (2 w + S u), half: h more; and one rounding to the dtype of the result
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_cpp_rows import TARGETS

import planish
from planish.codegen import cpp_attention, cpp_build, cpp_op
from planish.codegen.cpp_attention import AttentionForm
from planish.ir.errors import PlanishError
from planish.ir.ops.attention import attend

KINDS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
U, H = 2.0**-24, 2.0**-9
SIZES = (2, 32)  # of q: with scores of 32 and more the rounding of what is bf16 already is seen
PLAIN = AttentionForm("f32", 32, 32, 32**-0.5, "bool", safe=True)
CAUSAL = AttentionForm("f32", 64, 64, 0.125, causal=True, safe=True, half=True)
ODD = AttentionForm("f32", 40, 24, 0.3, "f32", sinks=True)
CAPPED = AttentionForm("f32", 64, 64, 0.125, softcap=5.0)
HALF = replace(PLAIN, half=True)
BF16 = replace(CAUSAL, dtype="bf16")
FORMS = {  # form: batch, heads, key heads, rows, keys
    PLAIN: [
        (2, 4, 4, 33, 70),
        (1, 2, 2, 9, 1100),
        (1, 3, 3, 1, 257),
        (2, 2, 1, 2, 5),
        (2, 2, 2, 12, 70),
        (1, 20, 20, 2, 1100),
        (1, 1, 1, 0, 3),
    ],
    HALF: [(2, 4, 4, 33, 70), (1, 2, 2, 9, 1100), (1, 4, 1, 4, 33), (1, 4, 2, 70, 70)],
    CAUSAL: [(1, 4, 2, 70, 70), (1, 2, 2, 40, 600), (2, 2, 2, 3, 9)],
    ODD: [(2, 4, 2, 9, 70), (1, 2, 1, 1, 600), (1, 1, 1, 5, 1)],
    replace(ODD, half=True): [(2, 4, 2, 9, 71)],
    CAPPED: [(1, 4, 1, 9, 40), (1, 4, 2, 1, 40)],
    BF16: [(1, 4, 2, 70, 70), (2, 2, 2, 3, 9)],
    replace(CAPPED, dtype="bf16", half=True): [(1, 4, 1, 9, 40), (1, 4, 2, 1, 40)],
    AttentionForm("f16", 16, 48, 0.25, "f16"): [(2, 2, 2, 17, 40), (1, 1, 1, 2, 33)],
}


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An architecture to compile for, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PLANISH_CPP_ARCH", request.param)
        yield request.param


def operands(form: AttentionForm, sizes: tuple[int, ...], seed: int, size: int = 2) -> list[torch.Tensor]:
    """q, k, v as heads of rows that lie together, a mask (a row that is masked throughout, or padding), sinks.

    Args:
        size: of q; scores are so large, too.
    """
    batch, heads, shared, rows, keys = sizes
    g, kind = torch.Generator().manual_seed(seed), KINDS[form.dtype]
    whole = torch.randn(batch, keys, shared * (form.depth + form.width), generator=g).to(kind)
    k, v = whole.split([shared * form.depth, shared * form.width], -1)
    found = [
        torch.randn(batch, rows, heads, form.depth, generator=g).mul(size).to(kind).transpose(1, 2),
        k.unflatten(-1, (shared, form.depth)).transpose(1, 2),
        v.unflatten(-1, (shared, form.width)).transpose(1, 2),
    ]
    if form.mask == "bool":
        mask = torch.rand(batch, 1, rows, keys, generator=g) > 0.3
        mask[:, :, : min(rows, 1)] = False
        if rows == 12:  # padding: a batch that is whole, others that are not
            mask = mask[:, :, 1:2] & (torch.arange(keys) < keys - 35) | (torch.arange(batch) == 0)[:, None, None, None]
        if rows == keys:
            mask = torch.ones(rows, keys).tril().bool()
        if keys == 5:
            mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
        found.append(mask)
    elif form.mask:
        found.append((torch.randn(heads, 1, keys, generator=g) * 2).to(KINDS[form.mask]))
    return [*found, torch.randn(heads, generator=g)] if form.sinks else found


def bounds(form: AttentionForm, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far a kernel may be from it."""
    q, k, v = (t.double() for t in given[:3])
    mask = given[3] if form.mask else None
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    sinks = given[-1].double() if form.sinks else None
    settings = (mask, form.scale, form.causal, form.safe, form.softcap or None, sinks)
    wanted, size = attend(q, k, v, *settings), attend(q, k, v.abs(), *settings)
    share = q.shape[1] // k.shape[1]
    products = (q.abs() @ k.abs().repeat_interleave(share, 1).transpose(-1, -2)) * form.scale
    score = (form.depth + 8) * U * products + (2 * H * products if form.half and form.dtype != "bf16" else 0.0)
    score = score + 8 * U * (products + (mask.abs() if mask is not None and mask.is_floating_point() else 0.0) + 8)
    weight = 2 * score.amax(-1, keepdim=True) + 32 * U + (1e-4 + H if form.half else 0.0)
    radius = size * (2 * weight + k.shape[2] * U + (H if form.half else 0.0)) * 1.5 + 1e-6
    return wanted, radius + wanted.abs() * {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}[form.dtype]


def far(form: AttentionForm, made: torch.Tensor, given: list[torch.Tensor]) -> float:
    """By how many times the bound the result is missed; numbers must be none in the same places."""
    wanted, radius = bounds(form, given)
    if not torch.equal(made.isnan(), wanted.isnan()):
        return float("inf")
    return float(((made.double() - wanted).abs() / radius).nan_to_num(0.0).amax()) if made.numel() else 0.0


def built(form: AttentionForm, *wrong: str) -> object:
    """The function of a kernel, compiled for the target; with the first piece of its text in place of the second."""
    text = cpp_attention.text_of(form)
    if wrong:
        assert wrong[0] in text, wrong
        text = text.replace(*wrong)
    return cpp_attention.runner(form, cpp_build.start(text, "attention"))


def test_forms(target: str, seed: int) -> None:
    made = {form: built(form) for form in FORMS}
    for form, cases in FORMS.items():
        reference = cpp_attention.reference_of(form)
        for sizes, size in itertools.product(cases, SIZES):
            given = operands(form, sizes, seed, size)
            result, eager = made[form](*given), reference(*given)  # type: ignore[operator]
            assert result.shape == eager.shape and result.stride() == eager.stride(), sizes
            assert far(form, result, given) <= 1.0, (form, sizes, size)
            assert far(form, eager, given) <= 1.0, (form, sizes, size)
            # roundings are as often up as down: far less than the bound on average
            if form.half and result.numel() and size == SIZES[0]:
                wanted, mean = bounds(form, given)[0], given[2].abs().double().mean()
                assert (result.double() - wanted).nan_to_num().abs().mean() <= 4 * H * mean, (form, sizes, size)


def test_what_is_no_number_stays_none(target: str, seed: int) -> None:
    for form in (replace(PLAIN, mask=""), replace(HALF, mask="")):
        run = built(form)
        for rows in (2, 11):
            given = operands(form, (1, 2, 2, rows, 40), seed)
            before = run(*given)  # type: ignore[operator]
            given[0][0, 1, 1, 5] = torch.nan
            made = run(*given)  # type: ignore[operator]
            assert made[0, 1, 1].isnan().all()
            made[0, 1, 1] = before[0, 1, 1]
            assert torch.equal(made, before)


def test_threads_do_not_change_a_bit(target: str, seed: int) -> None:
    run, given = built(CAUSAL), operands(CAUSAL, (1, 2, 1, 300, 300), seed)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(*given))  # type: ignore[operator]
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_op(seed: int) -> None:
    kernel = cpp_attention.kernel(PLAIN)
    assert cpp_attention.kernel(PLAIN) is kernel
    given = operands(PLAIN, (2, 4, 2, 6, 9), seed)
    torch.library.opcheck(kernel.op, tuple(given))
    made = kernel.op(*given)
    assert made.transpose(1, 2).is_contiguous()  # heads of a row lie together: the next reshape is free
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in given[:3]]  # the last axis has a stride
    assert torch.equal(kernel.op(*turned, given[3]), made)
    compiled = torch.compile(lambda q, k, v, m: kernel.op(q, k, v, m) * 2, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*given), made * 2)
    with pytest.raises(RuntimeError, match=r"q: expected shape \[B, H, T, 32\], got \[2, 4, 6, 32\], of another dtype"):
        kernel.op(given[0].double(), *given[1:])
    with pytest.raises(RuntimeError, match=r"v: expected shape \[2, 2, 8, 32\], got \[2, 2, 9, 32\]"):
        kernel.op(given[0], given[1][:, :, :8], *given[2:])
    with pytest.raises(RuntimeError, match=r"k: expected shape \[2, G, S, 32\], got \[2, 9, 32\]"):
        kernel.op(given[0], given[1][0], *given[2:])
    with pytest.raises(
        RuntimeError, match=r"mask: expected shape \[2, 4, 6, 9\], got \[2, 1, 6, 9\], of another dtype"
    ):
        kernel.op(*given[:3], given[3].float())
    with pytest.raises(RuntimeError, match="heads are not shared evenly"):
        kernel.op(given[0][:, :3], *given[1:])


def test_native_and_python(seed: int) -> None:
    """Both ways from torch to a kernel give the same bits, for all ways in which a mask is broadcast."""
    for form in (replace(PLAIN, scale=0.17), AttentionForm("f16", 16, 48, 0.25, "f16")):  # no other test's: one target
        kernel = cpp_attention.kernel(form)
        python = cpp_attention.runner(form, cpp_build.start(kernel.text, kernel.name))
        given = operands(form, (2, 4, 2, 6, 9), seed)
        for mask in (given[3], given[3][-1], given[3][:1, :1, :1], given[3][..., :1, 3:4], given[3][0, 0, 0]):
            one, two = kernel.op(*given[:3], mask), python(*given[:3], mask)
            assert torch.equal(one, two) and one.stride() == two.stride()
            assert far(form, one, [*given[:3], mask]) <= 1.0
    run = built(PLAIN)
    given = operands(PLAIN, (2, 4, 2, 6, 9), seed)
    with pytest.raises(PlanishError, match=r"attention: expected torch.float32 \[B, H, T, 32\]"):
        run(given[0].double(), *given[1:])  # type: ignore[operator]
    with pytest.raises(PlanishError, match=r"got torch.float32 \[2, 4, 6, 32\], torch.float32 \[2, 2, 8, 32\]"):
        run(given[0], given[1][:, :, :8], *given[2:])  # type: ignore[operator]
    with pytest.raises(PlanishError, match="heads are not shared evenly"):
        run(given[0][:, :3], *given[1:])  # type: ignore[operator]


def test_a_full_library_is_followed_by_another(seed: int) -> None:
    before, after = (cpp_attention.kernel(replace(PLAIN, scale=scale)) for scale in (0.23, 0.29))
    given = operands(PLAIN, (2, 4, 2, 6, 9), seed)
    wanted = before.op(*given)
    found = cpp_op._dispatch("planish_cpu")
    if found is None:
        pytest.skip("torch has no stable interface here")
    libraries, found.used = found.libraries, found.library.places()
    for scale in (0.31, 0.37):
        kernel = cpp_attention.kernel(replace(PLAIN, scale=scale))
        assert far(kernel.form, kernel.op(*given), given) <= 1.0
    assert (found.libraries, found.used) == (libraries + 1, 2)
    assert torch.equal(before.op(*given), wanted) and far(after.form, after.op(*given), given) <= 1.0


def test_rows_that_see_nothing(seed: int) -> None:
    """All keys of a batch masked, for few rows and many, one chunk of keys and two; and of the first chunk only."""
    form = replace(HALF, safe=False)
    run = built(form)
    for rows, keys in ((2, 40), (12, 40), (12, 600), (12, 1100)):
        given = operands(form, (2, 2, 2, rows, keys), seed)
        given[3] = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        given[3][0] = False
        given[3][1, ..., : keys // 2] = False
        made = run(*given)  # type: ignore[operator]
        assert made[0].isnan().all() and far(form, made, given) <= 1.0
        given[3] = given[3].expand(2, 1, rows, keys).contiguous()
        assert torch.equal(run(*given).nan_to_num(9.0), made.nan_to_num(9.0))  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (1, 2, 0, 5), (2, 2, 3, 0), (1, 2, 7, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    batch, heads, rows, keys = shape
    q, k = torch.randn(batch, heads, rows, 32), torch.randn(batch, heads, keys, 32)
    mask = torch.ones(batch, 1, rows, keys, dtype=torch.bool)
    made = cpp_attention.kernel(PLAIN).op(q, k, k, mask)
    assert made.shape == q.shape and not made.any()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("PLANISH_CXX", "")
    form = replace(PLAIN, scale=0.11)
    kernel = cpp_attention.kernel(form)
    given = operands(form, (1, 2, 2, 3, 5), seed)
    assert kernel.text == ""
    assert torch.equal(kernel.op(*given).nan_to_num(), kernel.reference(*given).nan_to_num())


# -- from the graph ------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]


def node_of(*shapes: tuple[int, ...], **options: object) -> planish.ir.graph.Node:  # type: ignore[name-defined]
    graph = planish.capture(Attention(**options), tuple(torch.randn(s) for s in shapes))
    graph, _ = planish.Pipeline("raise").run(graph)
    return next(node for node in graph.nodes if node.op.name == "attention")


def test_forms_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 4, 6, 8)
    monkeypatch.setenv("PLANISH_CPP_ARCH", "x86-64-v4")
    assert cpp_attention.form_of(node_of(shape, shape, shape)) == AttentionForm("f32", 8, 8, 8**-0.5, safe=True)
    causal = cpp_attention.form_of(node_of(shape, shape, shape, is_causal=True, scale=0.5), half=True)
    assert causal == AttentionForm("f32", 8, 8, 0.5, causal=True, safe=True, half=True)
    wide = (2, 4, 6, 520)
    assert cpp_attention.form_of(node_of(wide, wide, wide)) == (
        "its heads are not shared evenly, or have more than 512 columns"
    )
    assert cpp_attention.attention(node_of(wide, wide, wide)) is None
    monkeypatch.setenv("PLANISH_CPP_ARCH", "x86-64-v3")
    slow = "torch's own attention is faster here: there is no compiler, or no AVX-512"
    assert cpp_attention.form_of(node_of(shape, shape, shape)) == slow
    monkeypatch.setenv("PLANISH_CPP_ARCH", "x86-64-v4")
    monkeypatch.setenv("PLANISH_CXX", "")
    assert cpp_attention.form_of(node_of(shape, shape, shape)) == slow


# -- wrong on purpose ----------------------------------------------------------------------------

WRONG = [
    (PLAIN, "bits |= (uint32_t)(line[j * step] != 0) << j", "bits |= (uint32_t)(line[j * step] == 0) << j"),
    (PLAIN, "_mm256_test_epi8_mask(held, held)", "_mm256_testn_epi8_mask(held, held)"),
    (PLAIN, "total = total * growth.factor +", "total = total +"),
    (PLAIN, "gemm::each(grown[r])", "gemm::each(1.0f)"),
    (PLAIN, "sums[r * WIDTH + e] *= growth.grown[r]", "sums[r * WIDTH + e] *= 1.0f"),
    (PLAIN, "if constexpr (F::SAFE) inverse", "if constexpr (false) inverse"),
    (ODD, "there = count >= BLOCK ? ~0u", "there = count >= 0 ? ~0u"),
    (PLAIN, "        if (!alike(s)) return end;\n", ""),
    (PLAIN, "if (r == 0 || !same)", "if (r == 0)"),
    (PLAIN, "!line[(end - 1) * s.mask[3]]", "line[(end - 1) * s.mask[3]]"),
    (HALF, "if (kept(line, s.mask[3], end - start)) return end;",
     "if (kept(line, s.mask[3], end - start)) return start;"),
    (ODD, "all &= row::wide(line[j]) == 0.0f", "all &= true"),
    (HALF, "_mm512_slli_epi16(_mm512_permutex2var_epi16(less[0], words, less[1]), 7)",
     "_mm512_slli_epi16(_mm512_permutex2var_epi16(less[1], words, less[0]), 7)"),
    (HALF, "_mm512_set1_ps(base[r] - 400.0f)", "_mm512_set1_ps(base[r] - 4.0f)"),
    (CAUSAL, "end = own[r].place + 1 - start", "end = own[r].place + 2 - start"),
    (CAUSAL, "Row{own.head + 1, 0}", "Row{own.head, 0}"),
    (CAUSAL, "together ? Row{at.head, at.place + r}", "together ? Row{at.head, at.place}"),
    (PLAIN, "next.scores = own, next.from += KEYS", "next.from += KEYS"),
    (CAUSAL, "(const Sizes &s, int64_t head, int64_t index) {\n    return Row{head * (s.heads / s.shared)",
     "(const Sizes &s, int64_t head, int64_t index) {\n    return Row{head"),
    (ODD, "total * factor + powers(sink > state.top", "total * factor + 0.0f * powers(sink > state.top"),
    (ODD, "larger(mask * LOG2E, least)", "larger(mask * 1.4f, least)"),
    (CAPPED, "(s.softcap * LOG2E)", "LOG2E"),
    (CAPPED, "bent = (1.0f - e) / (1.0f + e)", "bent = (1.0f - e)"),
    (BF16, "if constexpr (!F::SCALED && !F::CAPPED) {", "if constexpr (false) {"),
    (BF16, "F::SCALED ? h.factor : 1.0f", "F::SCALED ? h.factor : 1.002f"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("form", "right", "wrong"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_wrong_kernels_are_seen(
    form: AttentionForm, right: str, wrong: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    monkeypatch.delenv("PLANISH_CPP_ARCH", raising=False)
    if right.startswith("_mm") and not all(f"avx512{part}" in cpp_build._machine() for part in ("bw", "vl", "_bf16")):
        pytest.skip("this machine does not run that piece")
    run = built(form, right, wrong)
    worst = []
    for sizes, size in itertools.product(FORMS[form], SIZES):
        given = operands(form, sizes, seed, size)
        worst.append(far(form, run(*given), given))  # type: ignore[operator]
    assert max(worst) > 1.0
