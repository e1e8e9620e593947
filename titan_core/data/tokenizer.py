"""Tokenizers: Hugging Face files, tiktoken files, SentencePiece models, and the built-in byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from titan_core.data import embedded, foreign_tokenizers
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Phase, Warned, silent

BUILT_IN_VOCAB = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


# A character has at most 4 bytes, so at most 4 tokens; a run this long that ends in none is no text (an untrained model
# makes such), and is shown as it is.
_MOST_HELD = 16


class Tokenizer:
    """Text to ids and back, with a begin and an end token.

    A tokenizer that adds its begin or end token itself is not made to add it twice, and none cuts or pads a text,
    whatever its file says.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
        self.backend = backend
        self.bos_id = self._id(bos)
        self.eos_id = self._id(eos)
        self.bos_token, self.eos_token = bos, eos
        backend.no_truncation()
        backend.no_padding()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, the rules, and what begins and ends a document."""
        content = f"{self.bos_id}/{self.eos_id}/{self.backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Return the ids of a text."""
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos)[0]

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool, add_eos: bool) -> list[list[int]]:
        """Return the ids of several texts, in parallel where the library can."""
        try:
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise _not_unicode(texts) from None
        head = [self.bos_id] if add_bos and self.bos_id is not None else []
        tail = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [head + item.ids + tail for item in encoded]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def files(self) -> dict[str, bytes]:
        """Return `tokenizer.json` and `tokenizer_config.json`, as Hugging Face libraries read them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": self.backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        }

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


class StreamDecoder:
    """Turns ids into text piece by piece, holding back bytes that are not yet whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: list[int] = []  # ids of the last piece: what a piece looks like depends on what is before it
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take one id and return the text that is certain now."""
        self._new.append(token)
        piece = self._text()
        if piece.endswith("\ufffd") and len(self._new) < _MOST_HELD:
            return ""
        if piece:
            self._known, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """Return what was held back."""
        piece, self._known, self._new = self._text(), self._new, []
        return piece

    def _text(self) -> str:
        before = self._tokenizer.decode(self._known)
        return self._tokenizer.decode(self._known + self._new)[len(before) :]


def _not_unicode(texts: Sequence[str]) -> DataError:
    """Return the error for texts with half of a surrogate pair, as bytes on a command line that are not UTF-8 give."""
    for text in texts:
        for number, letter in enumerate(text, 1):
            if 0xD800 <= ord(letter) <= 0xDFFF:
                return DataError(f"the text is not valid Unicode (character {number})", tip="is it in UTF-8?")
    return DataError("the tokenizer was given something other than text")


def tokenizer_from_files(files: dict[str, bytes]) -> Tokenizer:
    """Rebuild a tokenizer from what `Tokenizer.files` returned."""
    config = json.loads(files["tokenizer_config.json"])
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    return Tokenizer(backend, config["bos_token"], config["eos_token"])


def load_tokenizer(path: str, listener: Listener = silent) -> Tokenizer:
    """Load the tokenizer of a folder or file; an empty path is the built-in one. Raises `DataError`."""
    if not path:
        return _built_in(listener)
    place = Path(path)
    if not place.exists():
        raise DataError(
            f"no tokenizer at `{path}`",
            where="model.hf_assets_path",
            tip="give a folder with tokenizer.json or tokenizer.model, or leave it empty for the built-in one",
        )
    folder = place if place.is_dir() else place.parent
    backend = _open(place, folder)
    config = _read_config(folder)
    try:
        _add_tokens(backend, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"`{folder / 'tokenizer_config.json'}` does not list its tokens as usual: {error!r}") from error
    vocab = backend.get_vocab(with_added_tokens=True)

    def named(key: str, usual: Sequence[str]) -> str | None:
        return _content(config[key]) if key in config else next((t for t in usual if t in vocab), None)

    bos, eos = named("bos_token", foreign_tokenizers.BOS_NAMES), named("eos_token", foreign_tokenizers.EOS_NAMES)
    return Tokenizer(backend, bos, eos)


def _open(place: Path, folder: Path) -> tokenizers.Tokenizer:
    names = [place.name] if place.is_file() else sorted(p.name for p in folder.iterdir())
    try:
        if place.is_file() and place.suffix == ".json":
            return tokenizers.Tokenizer.from_file(str(place))
        if "tokenizer.json" in names:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if "vocab.json" in names and "merges.txt" in names:
            return foreign_tokenizers.from_merges(folder)
        for name in names:
            if name.endswith((".model", ".tiktoken")):
                return foreign_tokenizers.from_model_file(folder / name)
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(f"cannot read the tokenizer in `{folder}`: {error}") from error
    raise DataError(
        f"no tokenizer files in `{folder}`; it holds {', '.join(names[:8]) or 'nothing'}",
        where="model.hf_assets_path",
        tip="expected tokenizer.json, vocab.json with merges.txt, or tokenizer.model",
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, if it is there."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read `{file}`: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"`{file}` is not a table of settings", tip="is it the file that came with the tokenizer?")
    return config


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that the settings name and the tokenizer lacks; those with a role are special in any case."""
    entries: dict[str, Any] = config.get("added_tokens_decoder") or {}
    missing: list[tokenizers.AddedToken] = []
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            flags = {key: entry.get(key, False) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            missing.append(tokenizers.AddedToken(entry["content"], **flags))
    backend.add_tokens(missing)
    roles = (_content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token"))
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = [token for token in roles if token and token not in known]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in named])
    for number, entry in entries.items():
        found = backend.token_to_id(entry["content"])
        if found != int(number):
            message = f"the token `{entry['content']}` is number {found}, but tokenizer_config.json says {number}"
            raise DataError(message, where="model.hf_assets_path", tip="the files belong to different tokenizers")


def _content(token: Any) -> str | None:
    """Return a token's text; settings give it alone or in a table with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _built_in(listener: Listener) -> Tokenizer:
    """Load the built-in tokenizer from the cache, or train it, which takes seconds."""
    recipe = f"{BUILT_IN_VOCAB}/{embedded.fingerprint('train')}/{tokenizers.__version__}/1"
    name = f"tokenizer-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.json"
    file = cache_folder() / name
    if os.path.isfile(file):  # unlike Path.is_file, no error where the folder may not be read
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), BOS, EOS)
        except Exception:  # a damaged cache file is replaced; the library raises bare Exception
            listener(Warned(f"the cached tokenizer `{file}` is damaged and is trained again"))
    listener(Phase("training the built-in tokenizer (once, some seconds)"))
    backend = _train()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(backend.to_str(), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        listener(Warned(f"the built-in tokenizer could not be cached in `{file.parent}`: {error.strerror}"))
    return Tokenizer(backend, BOS, EOS)


def _train() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILT_IN_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((embedded.text(path) for path in embedded.files("train")), trainer)
    return backend


def cache_folder() -> Path:
    """Return where titan keeps what it can make again: $TITAN_CACHE, $XDG_CACHE_HOME/titan or ~/.cache/titan."""
    if "TITAN_CACHE" in os.environ:
        return Path(os.environ["TITAN_CACHE"])
    try:
        home = Path.home()
    except RuntimeError:  # an account without an entry or a HOME, as in some containers
        home = Path(tempfile.gettempdir())
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "titan"
