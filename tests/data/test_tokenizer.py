"""Tokenizers of every make, against the libraries that made them."""

import base64
import json
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from titan_core.data.foreign_tokenizers import LLAMA3_SPECIAL, LLAMA3_SPLIT
from titan_core.data.tokenizer import StreamDecoder, load_tokenizer, tokenizer_from_files
from titan_core.runtime.errors import DataError

ODD = [
    "",
    " ",
    "hello world",
    "a\r\nb\tc\x00d",
    "é ü ñ",
    "日本語 テスト",
    "😀👩‍👩‍👧",
    "  indented\n\n\nline",
    "I'll 12345 don't",
]


@pytest.fixture(scope="module")
def built_in():
    return load_tokenizer("")


def test_built_in_round_trip(built_in) -> None:
    assert built_in.vocab_size == 2048
    for text in ODD:
        ids = built_in.encode(text, add_bos=True, add_eos=True)
        assert ids[0] == built_in.bos_id
        assert ids[-1] == built_in.eos_id
        assert built_in.decode(ids) == text


def test_built_in_is_cached(built_in, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TITAN_CACHE", str(tmp_path))
    first = load_tokenizer("")
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert load_tokenizer("").fingerprint == first.fingerprint == built_in.fingerprint
    assert file.stat().st_mtime_ns == written
    file.write_text("{")
    heard = []
    assert load_tokenizer("", heard.append).fingerprint == first.fingerprint
    assert any("damaged" in getattr(event, "text", "") for event in heard)


def test_files_round_trip_and_transformers_reads_them(built_in, tmp_path) -> None:
    files = built_in.files()
    again = tokenizer_from_files(files)
    assert again.fingerprint == built_in.fingerprint
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ODD:
        ids = built_in.encode(text, add_bos=False, add_eos=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == built_in.eos_id


def test_stream_decoder_holds_back_half_characters(built_in) -> None:
    for text in ODD:
        decoder = StreamDecoder(built_in)
        pieces = [decoder.push(token) for token in built_in.encode(text, add_bos=True, add_eos=False)]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) + decoder.finish() == text


def test_stream_decoder_shows_what_was_held_back_at_the_end(built_in) -> None:
    half = built_in.encode("x\U0001f600", add_bos=False, add_eos=False)[:-1]
    decoder = StreamDecoder(built_in)
    assert "".join(decoder.push(token) for token in half) == "x"
    assert decoder.finish().startswith("\ufffd")
    assert decoder.finish() == ""


def with_config(folder: Path, backend: tokenizers.Tokenizer, **config) -> str:
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def copy_of(tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())


def test_a_text_is_neither_cut_nor_padded(built_in, tmp_path) -> None:
    backend = copy_of(built_in)
    backend.enable_truncation(8)
    backend.enable_padding(length=4096)
    loaded = load_tokenizer(with_config(tmp_path, backend))
    text = "a long text " * 100
    assert loaded.encode(text, add_bos=True, add_eos=True) == built_in.encode(text, add_bos=True, add_eos=True)


def test_added_tokens_keep_their_flags(built_in, tmp_path) -> None:
    backend = copy_of(built_in)
    backend.add_tokens(["<tool>"])
    number = backend.token_to_id("<tool>")
    added = {
        str(number): {"content": "<tool>", "special": False},
        str(number + 1): {"content": "<think>", "special": False, "lstrip": True},
        str(number + 2): {"content": "<pad>", "special": True},
    }
    loaded = load_tokenizer(with_config(tmp_path, backend, added_tokens_decoder=added, pad_token="<pad>"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "use <tool> and   <think> then <pad> end"
    ids = loaded.encode(text, add_bos=False, add_eos=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert "<tool>" in loaded.decode(ids)
    assert "<pad>" not in loaded.decode(ids)
    assert loaded.vocab_size == number + 3


def test_what_begins_a_document_is_guessed_only_where_nothing_says_it(built_in, tmp_path) -> None:
    end = {"content": "<|end_of_text|>", "lstrip": False}
    silent = load_tokenizer(with_config(tmp_path, copy_of(built_in)))
    assert (silent.bos_id, silent.eos_id) == (built_in.bos_id, built_in.eos_id)
    said = load_tokenizer(with_config(tmp_path, copy_of(built_in), bos_token=None, eos_token=end))
    assert (said.bos_id, said.eos_id) == (None, built_in.eos_id)
    assert said.encode("", add_bos=True, add_eos=True) == [built_in.eos_id]
    assert said.fingerprint != silent.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"77": {"content": "<new>"}}}, "number 2048, but tokenizer_config.json says 77"),
        ({"added_tokens_decoder": {"2048": {"text": "<new>"}}}, "does not list its tokens as usual"),
        ([], "not a table of settings"),
    ],
)
def test_settings_of_another_tokenizer_are_refused(config, message: str, built_in, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(built_in.backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_vocabulary_with_merges_encodes_as_transformers_does(tmp_path) -> None:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [Path(json.__file__).read_text()], 500, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save_model(str(tmp_path))
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"),
        vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"),
    )  # fmt: skip
    ours = load_tokenizer(str(tmp_path))
    assert ours.bos_id is None
    assert ours.eos_id == theirs.eos_token_id == 0
    for text in ODD:
        ids = ours.encode(text, add_bos=False, add_eos=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text


def test_a_cache_that_cannot_be_written_is_said(built_in, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TITAN_CACHE", str(tmp_path / "file"))
    heard = []
    assert load_tokenizer("", heard.append).fingerprint == built_in.fingerprint
    assert any("could not be cached" in getattr(event, "text", "") for event in heard)


def ranks_file(folder: Path) -> tuple[Path, dict[bytes, int]]:
    """Train a small BPE and write it as tiktoken ranks."""
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    text = Path(json.__file__).read_text() + Path(transformers.__file__).read_text()[:20000]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    from titan_core.data.foreign_tokenizers import _byte_letters

    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(letters[c] for c in token): rank for token, rank in vocab}
    path = folder / "tokenizer.model"
    path.write_bytes(b"\n".join(base64.b64encode(t) + b" %d" % r for t, r in ranks.items()))
    return path, ranks


def test_tiktoken_ranks_encode_as_tiktoken_does(tmp_path) -> None:
    path, ranks = ranks_file(tmp_path)
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    ours = load_tokenizer(str(path))
    assert len(LLAMA3_SPECIAL) == 256
    assert ours.vocab_size == len(ranks) + 256
    assert ours.bos_id == special["<|begin_of_text|>"]
    assert ours.eos_id == special["<|end_of_text|>"]
    for text in [*ODD, Path(json.__file__).read_text()]:
        ids = theirs.encode(text, disallowed_special=())
        assert ours.encode(text, add_bos=False, add_eos=False) == ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_encodes_as_sentencepiece_does(kind: str, tmp_path) -> None:
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    import io

    lines = Path(json.__file__).read_text().splitlines() * 3 + [t for t in ODD if t.strip()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    theirs = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ours = load_tokenizer(str(path))
    assert ours.bos_id == theirs.bos_id()
    for text in ["hello world", "def f(x): return x", "import json", "a new encoder", "日本語", "  two spaces"]:
        assert ours.encode(text, add_bos=False, add_eos=False) == theirs.encode(text)
        ids = theirs.encode(text)
        assert ours.decode(ids) == text
        decoder = StreamDecoder(ours)
        assert "".join(decoder.push(token) for token in ids) + decoder.finish() == text


def test_begin_and_end_are_not_added_twice(built_in, tmp_path) -> None:
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer.from_str(built_in.backend.to_str())
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", built_in.bos_id)]
    )
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    ids = load_tokenizer(str(tmp_path)).encode("hello", add_bos=True, add_eos=False)
    assert ids.count(built_in.bos_id) == 1


def test_errors_say_what_to_do(tmp_path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "no"))
    with pytest.raises(DataError, match="no tokenizer files"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_stream_decoder_does_not_hold_back_what_is_no_text(built_in) -> None:
    lone = next(i for i in range(built_in.vocab_size) if built_in.decode([i]) == "\ufffd")
    decoder = StreamDecoder(built_in)
    pieces = [decoder.push(lone) for _ in range(200)]
    assert sum(map(len, pieces)) > 150
    assert "".join(pieces) + decoder.finish() == built_in.decode([lone] * 200)
    assert decoder.push(built_in.encode("x", add_bos=False, add_eos=False)[0]) == "x"


def test_a_tokenizer_file_may_have_any_name(built_in, tmp_path) -> None:
    (tmp_path / "mine.json").write_text(built_in.backend.to_str())
    assert load_tokenizer(str(tmp_path / "mine.json")).fingerprint == built_in.fingerprint


def test_text_that_is_no_unicode_is_named(built_in) -> None:
    argument = b"a\xffb".decode(errors="surrogateescape")  # as a command line gives it
    with pytest.raises(DataError, match=r"not valid Unicode \(character 2\)") as caught:
        built_in.encode_batch(["fine", argument], add_bos=True, add_eos=False)
    assert "UTF-8" in (caught.value.tip or "")
