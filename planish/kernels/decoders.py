"""The decoders of weights, as data: how codes become the operand of a multiplication.

A decoder is a file of planish/kernels with its device functions and its eager reference, and one row here: expressions
with {codes} for a tile of stored codes, {plane} for the plane of a byte, {zero} for a zero point that broadcasts
against the tile, {dtype} for the kernel's float; in references {columns}, {span}. Emission reads the rows; neither
Triton nor torch is imported here. Clusters (`decode_split`) choose scales and zero points for the codes of any of these
rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """A row.

    Attributes:
        name: as in `kernel_spec.Weight.decoder`.
        file: of planish/kernels, without ".py"; "" for what needs no function.
        bits: of a code in memory; 16 stands for the kernel's float.
        integer: int8, `times` the signed code; "" if there is none.
        times: see there; the scale takes it back.
        less_zero: int8, the code less an int8 zero point of signed codes; "" where that has more than 8 bits.
        half: float16, the signed code less {zero}, exactly if that is an integer.
        wide: the same in {dtype}.
        reference: the signed codes, float64 [N, columns], of the stored tensor {codes}.
    """

    name: str
    file: str
    bits: int
    integer: str = ""
    times: int = 1
    less_zero: str = ""
    half: str = "{codes}"
    wide: str = "{codes}"
    reference: str = "{codes}"

    @property
    def middle(self) -> int:
        """What unsigned codes are more than signed ones."""
        return 0 if self.bits == 16 else 1 << (self.bits - 1)


def functions_of(text: str) -> tuple[str, ...]:
    """The functions that an expression calls, methods and those of tl aside."""
    return tuple(dict.fromkeys(re.findall(r"(?<![.\w])([a-z]\w*)\(", text)))


def _planes(bits: int) -> Decoder:
    return Decoder(
        f"int{bits}",
        "decode_planes",
        bits,
        integer=f"scaled_plane({{codes}}, {bits}, {{plane}})",
        times=1 << (8 - bits),
        less_zero=f"plane_less_zero({{codes}}, {{zero}}, {bits}, {{plane}})",
        half=f"half_plane({{codes}}, {{zero}}, {bits}, {{plane}})",
        wide=f"float_plane({{codes}}, {{zero}}, {bits}, {{plane}}, {{dtype}})",
        reference=f"planes_reference({{codes}}, {bits}, {{span}}, {{columns}}) - {1 << (bits - 1)}.0",
    )


DECODERS: dict[str, Decoder] = {
    row.name: row
    for row in (
        Decoder("float", "", 16),
        Decoder(
            "int8",
            "decode_int8",
            8,
            integer="{codes}",
            half="half_of_int8({codes}, {zero})",
            wide="float_of_int8({codes}, {zero}, {dtype})",
            reference="int8_reference({codes}, {columns})",
        ),
        _planes(4),
        _planes(2),
    )
}
