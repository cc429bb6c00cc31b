"""How strings, bytes and tensor elements are spelled in the text form, exactly and in ASCII."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.ir.types import bits, is_float, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

_PLAIN = re.compile(r"[ !#-\[\]-~]*\Z")
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)", re.DOTALL)
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def quote(text: str) -> str:
    """A string in double quotes, ASCII only; `unquote` gives it back, lone surrogates included."""
    if _PLAIN.match(text):
        return f'"{text}"'
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    code = ord(char)
    if 32 <= code < 127:
        return char
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unquote(body: str) -> str:
    """What stands between the quotes, without its escapes; ValueError for one that does not exist."""
    return body if "\\" not in body else _ESCAPE.sub(_unescaped, body)


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    if code not in _LETTERS:
        raise ValueError(f"unknown escape '\\{code}'")
    return _LETTERS[code]


def encode_float(number: float) -> str:
    """A float: `1.0`, `inf`, `nan`, or `nan:0x...` for a NaN that is not the canonical one."""
    import struct

    if number == number:
        return repr(number)
    bits = struct.pack(">d", number).hex()
    return "nan" if bits == "7ff8000000000000" else f"nan:0x{bits}"


def decode_float(text: str) -> float:
    """The inverse of `encode_float`."""
    import struct

    if text.startswith("nan:0x"):
        return float(struct.unpack(">d", int(text[6:], 16).to_bytes(8, "big"))[0])
    return float(text)


def encode_elements(raw: np.ndarray, dtype: str) -> list[str]:
    """One word for each element of a tensor of IR dtype `dtype`, in C order."""
    import numpy as np

    flat = raw.reshape(-1)
    if dtype == "str":
        return [quote(e) if isinstance(e, str) else "b" + quote(bytes(e).decode("latin-1")) for e in flat]
    if dtype == "bool":
        return ["true" if e else "false" for e in flat.tolist()]
    if dtype in ("c64", "c128"):
        words = _encode_floats(flat.view(np.float32 if dtype == "c64" else np.float64))
        return [f"({re}, {im})" for re, im in zip(words[::2], words[1::2], strict=True)]
    if is_float(dtype):
        return _encode_floats(flat)
    return [str(e) for e in flat.astype(np.int64 if dtype[0] == "i" else np.uint64).tolist()]


def _encode_floats(flat: np.ndarray) -> list[str]:
    import numpy as np

    with np.errstate(invalid="ignore"):
        exact = [repr(e) for e in flat.astype(np.float64).tolist()]
    words = [str(e) for e in flat] if flat.dtype == np.float32 else exact
    codes = flat.view(_UNSIGNED[flat.dtype.itemsize])
    wrong = _decode_floats(words, flat.dtype).view(codes.dtype) != codes
    for i in wrong.nonzero()[0].tolist():
        again = _decode_floats([exact[i]], flat.dtype).view(codes.dtype)
        words[i] = exact[i] if again[0] == codes[i] else f"{int(codes[i]):#x}"  # a NaN with a payload or a sign
    return words


def decode_elements(words: Sequence[str], dtype: str, wide: bool) -> np.ndarray:
    """The inverse of `encode_elements`, shape [n], held in float64 if `wide`.

    Raises:
        ValueError: a word is no element of the dtype, or is out of its range.
    """
    import numpy as np

    if dtype == "bool":
        values = {"true": True, "false": False}
        for word in words:
            if word not in values:
                raise ValueError(f"'{word}' is no bool")
        return np.array([values[word] for word in words], np.bool_)
    if dtype in ("c64", "c128"):
        parts = [part for word in words for part in word.strip("()").split(",")]
        if len(parts) != 2 * len(words):
            raise ValueError("a complex number is written as (re, im)")
        halves = _decode_floats(parts, np.dtype(np.float32 if dtype == "c64" else np.float64))
        return halves.view(numpy_dtype(dtype))
    logical = numpy_dtype(dtype)
    if is_float(dtype):
        return _decode_floats(words, np.dtype(np.float64) if wide else logical)
    try:
        plain = np.array([int(word) for word in words], np.int64 if dtype[0] == "i" else np.uint64)
    except OverflowError as error:
        raise ValueError(f"integer out of the range of {dtype}") from error
    array = plain.astype(logical)
    width = bits(dtype)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if dtype[0] == "i" else (0, 2**width - 1)
    if (width < 8 and ((plain < low) | (plain > high)).any()) or not (array.astype(plain.dtype) == plain).all():
        raise ValueError(f"integer out of the range of {dtype}")
    return array


def _decode_floats(words: Sequence[str], dtype: np.dtype[Any]) -> np.ndarray:
    import numpy as np

    plain = np.array([0.0 if word.startswith("0x") else float(word) for word in words], np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        array = plain.astype(dtype)
    for i, word in enumerate(words):
        if word.startswith("0x"):
            try:
                array.view(_UNSIGNED[dtype.itemsize])[i] = int(word, 16)
            except OverflowError as error:
                raise ValueError(f"'{word}' has too many bits") from error
    return array
