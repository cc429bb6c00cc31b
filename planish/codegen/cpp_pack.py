"""How a gemm's weights lie in memory for the CPU, and how they come there from planish's "triton" layout.

Columns of a block of 64 outputs lie together, in 4 panels of 16, so that one core streams through a weight once:

    integers  u8   [N / 64, K / step, 4, 16, 4]   step = 32 / bits columns: byte b of a lane holds 8 / bits codes,
                                                  column 4 p + b of the step in the bits from bits p on
    codes     i32  [N / 64, K / step, 4, 16]      4 and 2 bits beside floats: column p in the bits from bits p on
    numbers   i8, u8, float [N / 64, K, 4, 16]    8-bit codes beside floats, floats, the right sides of branches
    ids       u8, i16, i32 [N / 64, K / step, 4, 16]   clusters of split codes, like codes

N is rounded up to 64, K to 64; what is added is 0. Scales, zero points, sums and biases are float32 [.., N], rounded
up as well, those of groups [.., N / 64, K / group, 64]: what a core reads lies together. Integer zero points are u8,
and all are those of unsigned codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planish.codegen.containers.triton import id_bits
from planish.codegen.gemm_plan import decoder_of
from planish.codegen.kernel_spec import Kernel, Product, Weight, padded

if TYPE_CHECKING:
    import torch

BLOCK = 64  # outputs that lie together
LANES = 16  # of a vector: outputs of a panel
MOST_COLUMNS = 65536  # whose products of bytes an int32 holds


@dataclass(frozen=True)
class Form:
    """How a gemm multiplies.

    Attributes:
        integer: codes times codes in int32; else float32, the weight decoded in registers.
        bits: of the weight's codes; 16 of floats.
        unit: columns that share all scales; all of them where there are no groups.
        groups: units of a row.
        step: columns that are decoded at a time.
        spread: the activation's codes are multiplied by their group's scale before they meet the weight.
        pairs: bfloat16 activations meet codes two at a time; zero points come in with sums of the activation.
    """

    integer: bool
    bits: int
    unit: int
    groups: int
    step: int
    spread: bool = False
    pairs: bool = False


def form_of(kernel: Kernel, dtype: str) -> Form:
    """How the products of a kernel are computed; they are of one kind.

    Args:
        dtype: the kernel's float.
    """
    a, weight = kernel.activation, kernel.products[0].weight
    assert a is not None
    decoder = decoder_of(kernel, weight)
    columns = padded(kernel.columns)
    exact = not weight.zero or all(kernel.tensor(p.weight.zero).dtype == "i8" for p in kernel.products)
    small = exact and not weight.clusters and decoder.bits <= 8
    integer = a.kind == "codes" and small and columns <= MOST_COLUMNS
    pairs = a.kind == "float" and small and decoder.bits < 8 and dtype == "bf16"
    sizes = [g for g in (weight.group, a.group if integer else 0) if g]
    unit = min((*sizes, columns))
    step = 1 if not integer and decoder.bits >= 8 and not weight.clusters else 32 // decoder.bits
    spread = not integer and a.kind == "codes" and a.granularity == "group"
    return Form(integer, decoder.bits, unit, -(-kernel.columns // unit), step, spread, pairs)


def id_width(weight: Weight, form: Form) -> int:
    """The bits of a lane of ids: 8, 16 or 32."""
    return max(8, form.step * id_bits(weight.clusters))


# -- tensors -------------------------------------------------------------------------------------


def _lanes(held: torch.Tensor) -> torch.Tensor:
    """[N, ..] as [N / 64, 4, 16, ..], rows of zeros added."""
    import torch

    rows = held.shape[0]
    more = -rows % BLOCK
    if more:
        held = torch.cat([held, held.new_zeros((more, *held.shape[1:]))])
    return held.reshape(-1, BLOCK // LANES, LANES, *held.shape[1:])


def integers(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [N, K] of 8, 4 or 2 bits as `integers`: u8."""
    import torch

    parts = 8 // bits
    held = _lanes(codes.to(torch.int32)).reshape(-1, 4, LANES, codes.shape[1] // (4 * parts), parts, 4)
    shifts = (torch.arange(parts, dtype=torch.int32) * bits).reshape(parts, 1)
    return (held << shifts).sum(4).permute(0, 3, 1, 2, 4).to(torch.uint8).contiguous()


def words(codes: torch.Tensor, bits: int, step: int, width: int = 32) -> torch.Tensor:
    """Unsigned codes [N, K] as `codes` or `ids`: `step` of them in a lane of `width` bits."""
    import torch

    held = _lanes(codes.to(torch.int64)).reshape(-1, 4, LANES, codes.shape[1] // step, step)
    made = (held << (torch.arange(step) * bits)).sum(4).permute(0, 3, 1, 2)
    kind = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[width]
    return made.to(kind).contiguous()


def numbers(held: torch.Tensor) -> torch.Tensor:
    """[N, K] as `numbers`, in its own dtype."""
    return _lanes(held).permute(0, 3, 1, 2).contiguous()


def wide(held: torch.Tensor) -> torch.Tensor:
    """[.., N] with N rounded up to a block by zeros; of one output it may be one number, []."""
    import torch

    held = held if held.dim() else held[None]
    return torch.nn.functional.pad(held, (0, -held.shape[-1] % BLOCK)).contiguous()


def tables(held: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Scales or zero points, `wide`; of groups, [.., K / group, N], a block's together: [.., N / 64, K / group, 64]."""
    held = wide(held)
    if not grouped:
        return held
    return held.reshape(*held.shape[:-1], -1, BLOCK).transpose(-2, -3).contiguous()


def prepared(kernel: Kernel, dtype: str, bound: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a gemm as the CPU reads them; what no product reads stays as it is.

    Args:
        dtype: the kernel's float.
        bound: as `Region.bind` makes them.
    """
    found = dict(bound)
    form = form_of(kernel, dtype)
    for product in kernel.products:
        found |= _product(kernel, product, form, bound)
    return found


def _product(
    kernel: Kernel, product: Product, form: Form, bound: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    import torch

    from planish.codegen.regions import unpack_codes

    w, columns = product.weight, padded(kernel.columns)
    found: dict[str, torch.Tensor] = {}
    codes, middle = bound[w.codes], 0 if form.bits == 16 else 1 << (form.bits - 1)
    if form.bits == 16:
        more = columns - kernel.columns
        found[w.codes] = numbers(torch.nn.functional.pad(codes, (0, more)))
    elif form.bits == 8:
        unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
        if form.integer:
            found[w.codes] = integers(unsigned, 8)
        elif w.clusters:
            found[w.codes] = words(unsigned, 8, form.step)
        else:
            found[w.codes] = numbers(unsigned if w.zero else codes)
    else:
        unsigned = unpack_codes(codes, form.bits, columns, signed=False)
        found[w.codes] = integers(unsigned, form.bits) if form.integer else words(unsigned, form.bits, form.step)
    if w.ids:
        bits = id_bits(w.clusters)
        ids = unpack_codes(bound[w.ids].view(torch.int8), bits, columns, signed=False)
        found[w.ids] = words(ids, bits, form.step, id_width(w, form))
    if w.scale:
        found[w.scale] = tables(bound[w.scale].float(), w.group > 0)
    if w.zero:
        zero = bound[w.zero]
        integer = zero.dtype == torch.int8
        zero = (zero.to(torch.int16) + middle).to(torch.uint8) if integer else zero.float()
        found[w.zero] = tables(zero, w.group > 0)
    if w.sums:
        found[w.sums] = wide(bound[w.sums].float())
    if product.bias:
        found[product.bias] = wide(bound[product.bias].float())
    for branch in product.branches:
        found[branch.right] = numbers(bound[branch.right].float())
    return found
