"""tiktoken's rank files, with ranks that no training would give: tiktoken itself is the oracle."""

import base64
import random
from pathlib import Path

import pytest
import tiktoken

from titan_core.data.foreign_tokenizers import LLAMA3_SPLIT, from_ranks
from titan_core.runtime.errors import DataError


def both(folder: Path, words: list[bytes]):
    """Return how titan and tiktoken spell a text with the bytes and these words as tokens, in the order of rank."""
    tokens = [bytes([byte]) for byte in range(256)] + words
    path = folder / "tokenizer.model"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    ours = from_ranks(path)
    return (lambda text: ours.encode(text, add_special_tokens=False).ids), theirs.encode


def test_a_token_ranked_before_its_parts_is_reached_as_tiktoken_reaches_it(tmp_path) -> None:
    ours, theirs = both(tmp_path, [b"aaa", b"aa"])
    assert ours("aaaa") == theirs("aaaa") == [256, ord("a")]


@pytest.mark.parametrize("seed", range(12))
def test_any_ranks_spell_as_tiktoken_does(seed: int, tmp_path) -> None:
    rng = random.Random(seed)
    letters = [b"a", b"b", b"c"][: 1 + seed % 3]
    pool = list(letters)
    for _ in range(300):
        word = rng.choice(pool) + rng.choice(pool)
        if len(word) <= 12 and word not in pool and len(pool) < 40:
            pool.append(word)
    words = pool[len(letters) :]
    if seed % 2:
        rng.shuffle(words)
    ours, theirs = both(tmp_path, words)
    texts = [b"".join(rng.choices(letters, k=rng.randint(1, 24))).decode() for _ in range(150)]
    assert [ours(text) for text in texts] == [theirs(text) for text in texts]


def test_a_line_without_a_rank_is_named(tmp_path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"YQ== 0\nYg==\n")
    with pytest.raises(DataError, match="not a `token rank` line") as caught:
        from_ranks(path)
    assert caught.value.where == f"{path}:2"
