"""Tokenizers from a folder, by the `tokenizers` package (extra `hf`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The fast tokenizer of a folder: tokenizer.json, else a WordPiece vocab.txt.

    Raises:
        PlanishError: neither is there or can be read, or the `tokenizers` package is not installed.
    """
    folder = Path(folder)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PlanishError(
            "tokenizer: the package 'tokenizers' is not installed", hint="pip install 'planish[hf]'"
        ) from error
    whole, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if whole.is_file():
        try:
            return Tokenizer.from_str(whole.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing narrower
            raise PlanishError(f"{whole}: not a tokenizer: {error}") from error
    if vocabulary.is_file():
        return _word_pieces(vocabulary, _configuration(folder).get("do_lower_case", True) is not False)
    raise PlanishError(f"{folder}: no tokenizer here; expected tokenizer.json or vocab.txt")


def _word_pieces(path: Path, lowercase: bool) -> Tokenizer:
    """The WordPiece tokenizer of a vocabulary with one token a line."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    try:
        tokens = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanishError(f"{path}: cannot be read: {error}") from error
    numbers = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in numbers]
    if missing:
        raise PlanishError(f"{path}: not a WordPiece vocabulary; expected a line '{missing[0]}'")
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}&&[^\t\n\r]]|\x{FFFD}"), "")]
    if lowercase:
        steps += [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
        ]
    )
    special = [(token, numbers[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special
    )
    return made


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanishError(f"{path}: not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def padding(encoder: Tokenizer, folder: Path) -> dict[str, Any]:
    """The padding token: the tokenizer's, else what its configuration names, else a usual one, else id 0."""
    known = encoder.padding
    if known is not None:
        return {k: known[k] for k in ("pad_id", "pad_type_id", "pad_token", "direction")}
    named = _configuration(folder).get("pad_token")
    if isinstance(named, dict):
        named = named.get("content")
    for token in (named, "[PAD]", "<pad>"):
        if isinstance(token, str) and (number := encoder.token_to_id(token)) is not None:
            return {"pad_id": number, "pad_token": token}
    return {}
