"""Packing loses no token and invents none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_core.data.order import permute
from titan_core.data.packing import IGNORE, Lane

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), min_size=1, max_size=12)


def rows(docs: list[list[int]], seq_len: int, split: bool):
    lane = Lane(lambda n: np.array(docs[n], dtype=np.int32) if n < len(docs) else None, seq_len, split)
    found = []
    while (row := lane.next_row()) is not None:
        found.append(row)
    return found


@given(documents, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_labels_are_the_stream_without_its_first_token(docs: list[list[int]], seq_len: int) -> None:
    stream = [token for doc in docs for token in doc]
    found = rows(docs, seq_len, split=True)
    labels = [label for row in found for label in row.labels if label != IGNORE]
    assert labels == stream[1:]
    for row in found:
        counted = row.labels != IGNORE
        assert (row.documents[counted] >= 0).all()
        inside = counted[:-1] & (row.documents[1:] >= 0)
        assert (row.tokens[1:][inside] == row.labels[:-1][inside]).all()


@given(documents, st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_whole_documents_are_not_cut_if_they_fit(docs: list[list[int]], seq_len: int) -> None:
    found = rows(docs, seq_len, split=False)
    pieces = []
    for row in found:
        used = int((row.documents >= 0).sum())
        last = [row.labels[used - 1]] if used and row.labels[used - 1] != IGNORE else []
        pieces.append([*row.tokens[:used].tolist(), *last])
    text = [tuple(piece) for piece in pieces]
    for doc in docs:
        if len(doc) <= seq_len + 1:
            joined = [",".join(map(str, piece)) for piece in text]
            assert any("," + ",".join(map(str, doc)) + "," in f",{piece}," for piece in joined) or len(doc) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_permutation_is_one(size: int) -> None:
    found = [permute(i, size, "key") for i in range(size)]
    assert sorted(found) == list(range(size))
    if size >= 17:
        assert found != list(range(size))
        assert found != [permute(i, size, "other") for i in range(size)]
