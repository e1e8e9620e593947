"""Tokenizer files of other makes, turned into the one backend: byte-pair merges, tiktoken ranks, SentencePiece."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from titan_core.runtime.errors import DataError, missing_extra

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|startoftext|>", "<bos>", "[BOS]")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>", "[EOS]")

# Llama 3's split of text before merging, and its 256 special tokens (Meta's tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
]


def from_merges(folder: Path) -> tokenizers.Tokenizer:
    """Load vocab.json with merges.txt: byte-level BPE (GPT-2's form)."""
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return _byte_level(bpe)


def from_model_file(file: Path) -> tokenizers.Tokenizer:
    """Load a `.model` or `.tiktoken` file: tiktoken ranks if it is text, a SentencePiece model otherwise."""
    start = file.read_bytes()[:4096]
    if _is_ranks(start):
        return from_ranks(file)
    return from_sentencepiece(file)


def from_ranks(file: Path) -> tokenizers.Tokenizer:
    """Load tiktoken's `base64-token rank` lines, as Llama 3 ships them.

    A merge list is not in the file, but follows from it: tiktoken joins any two neighbours whose join is a token, the
    lowest rank first, so every split of a token into two tokens is a merge of that token's rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            raise DataError("not a `token rank` line", where=f"{file}:{number}")
        ranks[base64.b64decode(parts[0])] = int(parts[1])
    letters = _byte_letters()
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    bpe = models.BPE({spell(token): rank for token, rank in ranks.items()}, merges)
    bpe.ignore_merges = True  # tiktoken takes a whole word that is a token without merging
    backend = _byte_level(bpe, split=LLAMA3_SPLIT)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL])
    return backend


def from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """Load a SentencePiece model: BPE or unigram, with byte fallback (Llama 2's form)."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        raise missing_extra("sentencepiece", "sentencepiece") from None
    proto: Any = schema.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf raises its own DecodeError
        message = f"`{file}` is neither tiktoken ranks nor a SentencePiece model"
        raise DataError(message, tip="is it a Git LFS pointer? download the file itself") from error
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next((i for i, p in enumerate(proto.pieces) if p.type == 2), 0)
    fallback = any(p.type == 6 for p in proto.pieces)
    if proto.trainer_spec.model_type == 1:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
    else:
        model = _sentencepiece_bpe(pieces, unknown, fallback)
    backend = tokenizers.Tokenizer(model)
    prefix = bool(proto.normalizer_spec.add_dummy_prefix)
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    control = [p.piece for p in proto.pieces if p.type == 3]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return backend


def _normalizer(spec: Any) -> tokenizers.normalizers.Normalizer:
    """Rebuild what a SentencePiece model does to text first: its character map, white space, the leading mark."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("\u2581"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])


def _sentencepiece_bpe(pieces: list[tuple[str, float]], unknown: int, fallback: bool) -> tokenizers.models.Model:
    """Recover the merges of a SentencePiece BPE: every split of a piece into two pieces, best score first."""
    index = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        local = [
            (index[piece[:cut]], index[piece[cut:]], piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in index and piece[cut:] in index
        ]
        merges += [(score, left, right) for _, _, left, right in sorted(local)]
    merges.sort(key=lambda item: -item[0])
    return models.BPE(
        index,
        [(left, right) for _, left, right in merges],
        unk_token=pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=fallback,
    )


def _byte_level(bpe: tokenizers.models.Model, split: str | None = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = byte_level
    else:
        pattern = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return every pair of tokens whose join is a token, by the rank of the join; then of the left, of the right part.

    One split a token is not enough: with aaa ranked before aa, tiktoken spells aaaa as aaa + a.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in splits if left in ranks and right in ranks]
        merges += [(left, right) for _, _, left, right in sorted(known)]
    return merges


def _is_ranks(start: bytes) -> bool:
    parts = start.split(b"\n", 1)[0].split()
    if len(parts) != 2 or not parts[1].isdigit():
        return False
    try:
        base64.b64decode(parts[0], validate=True)
    except ValueError:
        return False
    return True


def _byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(spare)
            spare += 1
    return [letters[byte] for byte in range(256)]
