"""How a gemm's main loop is cut: in which numbers it multiplies, in how many planes, and where scales come in.

Columns are taken BLOCK_K at a time, a whole number of spans. Within a span the planes of packed codes are one operand
each; a run of planes shares its scales. What is not packed is read in the same cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

from planish.codegen.kernel_spec import SPAN, Kernel, Weight, padded
from planish.kernels.decoders import DECODERS, Decoder

STEPS = (128, 64, 256)  # columns at a time; the first that fits is the default
LEAST = {True: 32, False: 16}  # columns of one multiplication: of integers, of floats
FLOATS = {"f16": "tl.float16", "bf16": "tl.bfloat16", "f32": "tl.float32"}


@dataclass(frozen=True)
class Run:
    """Planes of a step that share their scales: `first` to `last` - 1; `offset`: the column at which they begin."""

    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class Cut:
    """How a step of the main loop is cut.

    Attributes:
        integer: int8 operands and int32 sums; else operands in the kernel's float.
        planes: operands in a span.
        steps: values that BLOCK_K can take.
        unit: columns that share all scales; 0: the scales come after the loop.
        in_loop: the sums are float32 and every run's are scaled.
        on_weight: scales are multiplied into the decoded weight, in the kernel's float.
        late: a plane of the activation is loaded where it is multiplied. Float sums of a group beside the total leave
            few registers: no two planes are held at once, and rows of the weight are clamped only where N is ragged.
    """

    integer: bool
    planes: int
    steps: tuple[int, ...]
    unit: int
    in_loop: bool
    on_weight: bool

    @property
    def half(self) -> int:
        """Columns of a plane in a span."""
        return SPAN // self.planes

    @property
    def late(self) -> bool:
        """See above."""
        return self.in_loop and not self.integer

    @property
    def sums(self) -> str:
        """The dtype of the accumulators."""
        return "tl.int32" if self.integer and not self.in_loop else "tl.float32"

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of a step."""
        if not self.unit or self.unit % SPAN == 0:
            return (Run(0, self.planes, 0),)
        share = self.unit // self.half if SPAN % self.unit == 0 else 1
        return tuple(Run(p, p + share, p * self.half) for p in range(0, self.planes, share))


def decoder_of(kernel: Kernel, weight: Weight) -> Decoder:
    """The row that decodes a weight's codes; of clusters that of their codes."""
    if weight.clusters:
        return DECODERS[f"int{8 // kernel.tensor(weight.codes).packed}"]
    return DECODERS[weight.decoder]


def bits_of(kernel: Kernel, weight: Weight) -> int:
    """The bits of a weight's codes; 16 for floats."""
    return decoder_of(kernel, weight).bits


def is_integer(kernel: Kernel, weight: Weight) -> bool:
    """True if codes of the activation meet codes whose difference to their zero point is an int8."""
    a, decoder = kernel.activation, decoder_of(kernel, weight)
    assert a is not None
    if a.kind == "float" or weight.clusters or not decoder.integer:
        return False
    if weight.zero and (not decoder.less_zero or kernel.tensor(weight.zero).dtype != "i8"):
        return False
    return min(g for g in (weight.group, a.group, SPAN) if g) >= LEAST[True]


def scaled_on_weight(kernel: Kernel, weight: Weight, dtype: str) -> bool:
    """True if a float weight is multiplied by its scales: they are stored in the kernel's own float."""
    if not (weight.group or weight.clusters) or not weight.scale:
        return False
    return kernel.tensor(weight.scale).dtype == dtype


def refusal(kernel: Kernel) -> str:
    """Why no gemm can be written for a kernel; "" if one can."""
    a = kernel.activation
    if a is None:
        return "it has no activation"
    weights = [p.weight for p in kernel.products]
    for weight in weights:
        if not weight.clusters and weight.decoder not in DECODERS:
            return f"there is no decoder '{weight.decoder}' in planish.kernels.decoders"
    for group in (a.group, *(w.group for w in weights)):
        if group and group % LEAST[False]:
            return f"groups of {group} columns are no multiple of {LEAST[False]}"
    if len({(w.decoder, w.group, bool(w.zero), bits_of(kernel, w)) for w in weights}) > 1:
        return "its products have weights of different kinds"
    return ""


def cut_of(kernel: Kernel, dtype: str) -> Cut:
    """The cut of a kernel's main loop.

    Args:
        dtype: the kernel's float.
    """
    a = kernel.activation
    assert a is not None
    weight = kernel.products[0].weight
    integer = is_integer(kernel, weight)
    packed = max(1, 8 // bits_of(kernel, weight), 8 // a.bits if a.kind == "codes" else 1)
    on_weight = not integer and scaled_on_weight(kernel, weight, dtype)
    groups = [g for g in (weight.group, a.group) if g]
    planes = packed
    while any(g % (SPAN // planes) for g in groups):
        planes *= 2
    unit = min(groups) if groups else 0
    steps = tuple(
        size for size in STEPS if size == SPAN or all(n % size == 0 for n in (*groups, padded(kernel.columns)))
    )
    in_loop = bool(groups) and (not on_weight or bool(a.group))
    return Cut(integer, planes, steps, unit, in_loop, on_weight)


def factor_of(kernel: Kernel, cut: Cut, weight: Weight) -> float:
    """What sums of products are too large by: codes keep their place at the top of a byte."""
    a = kernel.activation
    if not cut.integer or a is None:
        return 1.0
    left = 2.0 ** (8 - a.bits) if a.signed else 1.0
    return left * (1.0 if weight.zero else decoder_of(kernel, weight).times)
