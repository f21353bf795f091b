"""The tokenizer of a checkpoint in the metadata of a GGUF file.

llama.cpp has two kinds that matter here. "gpt2" is byte-level BPE: text is cut into pieces by one of its built-in
patterns, named by ``tokenizer.ggml.pre``, before merges apply. "llama" is SentencePiece's BPE: no pieces, spaces
written as U+2581, and merges in the order of the tokens' scores. Which one and which pattern follows from
tokenizer.json alone: a pattern that is none of llama.cpp's would give other tokens than the model has learned, and is
refused.

Sources: llama.cpp's ``src/llama-vocab.cpp`` and ``conversion/base.py``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivlm.errors import InputError
from bivlm.untrusted import in_a_line, short

if TYPE_CHECKING:
    from gguf import GGUFWriter, SpecialVocab

FILE = "tokenizer.json"
# Kinds of tokens, as in llama.h.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_SCORE = -1000.0  # as the converter has it; added tokens are found before any score counts


@dataclass(frozen=True)
class _Pieces:
    """One of llama.cpp's patterns, and text that has to be one token before it applies."""

    pre: str
    whole: tuple[str, ...] = ()


_GPT2 = _Pieces("gpt-2")
_LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# By the pattern in tokenizer.json.
_KNOWN = {
    f"{_CONTRACTIONS}|{_LLAMA_3}": _Pieces("llama-bpe"),
    f"{_CONTRACTIONS}|{_QWEN_2}": _Pieces("qwen2"),
    # Of the reference model. None of its merges goes beyond a piece of GPT-2's pattern, but for the letter of an option
    # after a line break. `tests/exports/test_gguf_llama.py` compares the tokens.
    r"\n[A-D]\.| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s": _Pieces("gpt-2", ("\nA.", "\nB.", "\nC.", "\nD.")),
}


def describe_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, merges or scores, special tokens and the chat template of the checkpoint in `folder`.

    Raises `InputError` naming tokenizer.json for a tokenizer that llama.cpp has no equal of.
    """
    file = folder / FILE
    said = _read(file)
    model = said["model"]
    sentencepiece = bool(model.get("byte_fallback"))
    special = _special(folder, vocab_size, merges=not sentencepiece)
    tokens = _Tokens(said, vocab_size, file)
    if sentencepiece:
        _check_sentencepiece(said, file)
        tokens.score(model["merges"])
        tokens.mark_bytes(model.get("unk_token"))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_a_space(said))
    else:
        pieces = _pieces(said, file)
        tokens.join(pieces.whole)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pieces.pre)
    writer.add_token_list(tokens.texts)
    if sentencepiece:
        writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.kinds)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _read(file: Path) -> dict[str, Any]:
    """Return what tokenizer.json says, as the tokenizers library understands it."""
    from tokenizers import Tokenizer

    try:
        said = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file}: no tokenizer of the tokenizers library ({in_a_line(error)})") from None
    kind, merges = said["model"]["type"], said["model"].get("merges")
    if kind != "BPE" or not merges:
        found = kind if kind != "BPE" else "BPE without merges"
        raise InputError(f"{file}: model: found {found}; GGUF holds BPE with merges")
    return said


def _special(folder: Path, size: int, *, merges: bool) -> SpecialVocab:
    """Return merges, special tokens and the chat template."""
    from gguf import SpecialVocab

    try:
        return SpecialVocab(folder, load_merges=merges, n_vocab=size)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: special tokens or chat template cannot be read ({in_a_line(error)})") from error


class _Tokens:
    """Texts, kinds and scores of all tokens by their numbers; rows of the embedding without a token are unused."""

    def __init__(self, said: dict[str, Any], size: int, file: Path) -> None:
        self.texts = [f"[PAD{number}]" for number in range(size)]
        self.kinds = [_UNUSED] * size
        self.scores = [_ADDED_SCORE] * size
        self.numbers: dict[str, int] = said["model"]["vocab"]
        added = said.get("added_tokens") or []
        for text, number in self.numbers.items():
            self._put(text, number, _NORMAL, file)
        for token in added:
            self._put(token["content"], token["id"], _CONTROL if token.get("special") else _USER_DEFINED, file)

    def _put(self, text: str, number: Any, kind: int, file: Path) -> None:
        if type(number) is not int or not 0 <= number < len(self.texts):
            found = f"{short(text)} is number {short(number)}"
            raise InputError(f"{file}: {found}; expected one below the vocabulary's size, {len(self.texts)}")
        self.texts[number], self.kinds[number] = text, kind

    def join(self, whole: tuple[str, ...]) -> None:
        """Let these texts be found before anything else, where the vocabulary has them."""
        for text in whole:
            number = self.numbers.get(_byte_level(text))
            if number is not None:
                self.texts[number], self.kinds[number] = text, _USER_DEFINED

    def score(self, merges: list[tuple[str, str]]) -> None:
        """Give each token minus the rank of the first merge that makes it; what no merge makes, such as a letter, 0."""
        for number, kind in enumerate(self.kinds):
            if kind == _NORMAL:
                self.scores[number] = 0.0
        for rank in range(len(merges) - 1, -1, -1):
            made = "".join(merges[rank])
            if made in self.numbers and self.kinds[self.numbers[made]] == _NORMAL:
                self.scores[self.numbers[made]] = -1.0 - rank

    def mark_bytes(self, unknown: str | None) -> None:
        for text, number in self.numbers.items():
            if _BYTE_TOKEN.fullmatch(text):
                self.kinds[number] = _BYTE
            elif text == unknown:
                self.kinds[number] = _UNKNOWN


def _pieces(said: dict[str, Any], file: Path) -> _Pieces:
    """Return what llama.cpp cuts text by as this tokenizer of bytes does."""
    normalizer = (said.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":  # which llama.cpp leaves out; text in NFC is the same without
        raise InputError(f"{file}: normalizer: found {short(normalizer)}; GGUF holds none, or NFC")
    cut = said.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    split, last = steps[:-1], steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not split and last.get("use_regex", True):
            return _GPT2
        if len(split) == 1 and split[0].get("type") == "Split" and not last.get("use_regex", True):
            pattern = split[0].get("pattern", {}).get("Regex", "")
            if pattern in _KNOWN and split[0].get("behavior") == "Isolated" and not split[0].get("invert"):
                return _KNOWN[pattern]
    raise InputError(
        f"{file}: pre_tokenizer: found {short(cut)}; GGUF holds the patterns of GPT-2, Llama 3 and Qwen2, and "
        "SentencePiece"
    )


def _check_sentencepiece(said: dict[str, Any], file: Path) -> None:
    """Raise `InputError` unless text is one piece, in which spaces are U+2581 and nothing else is changed."""
    steps = _steps(said.get("normalizer"), "normalizers")
    cuts = _steps(said.get("pre_tokenizer"), "pretokenizers")
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    whole = all(cut.get("type") == "Metaspace" and not cut.get("split", True) for cut in cuts)
    if not whole or [step for step in steps if step.get("type") != "Prepend"] != ([] if cuts else spaces):
        found = short({"normalizer": said.get("normalizer"), "pre_tokenizer": said.get("pre_tokenizer")})
        raise InputError(f"{file}: found {found}; GGUF holds SentencePiece as Llama 2 has it")


def _adds_a_space(said: dict[str, Any]) -> bool:
    """Return whether a space is put before the first word."""
    prepended = any(step.get("type") == "Prepend" for step in _steps(said.get("normalizer"), "normalizers"))
    cuts = _steps(said.get("pre_tokenizer"), "pretokenizers")
    return prepended or any(cut.get("prepend_scheme", "always") != "never" for cut in cuts)


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which is one, a sequence, or none."""
    return [] if value is None else value.get(key, [value])


def _byte_level(text: str) -> str:
    """Return ASCII text as byte-level BPE writes it: bytes without a glyph are moved up by 256."""
    return "".join(chr(256 + ord(each)) if ord(each) <= 32 else each for each in text)
