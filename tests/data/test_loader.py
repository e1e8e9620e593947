"""Batches do not depend on ranks, workers or microbatches, and a position outlives them all."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from titan_core.config.load import load
from titan_core.data.build import build_train_loader, build_validation_slice
from titan_core.data.loader import BatchLoader, _Producer, data_hash, merge_states
from titan_core.data.tokenizer import load_tokenizer
from titan_core.runtime.errors import DataError

SEQ_LEN, GLOBAL = 48, 8


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents in JSON lines: an epoch ends within a few steps."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    lines = [json.dumps({"text": f"document {i} " + "word " * (i * 7 % 12)}) for i in range(40)]
    path.write_text("\n".join(lines))
    return path


def config_for(path: Path | None, **data):
    config = load("llama3_debugmodel").config
    training = dataclasses.replace(config.training, seq_len=SEQ_LEN, dataset_path=str(path) if path else None)
    return dataclasses.replace(config, training=training, data=dataclasses.replace(config.data, **data))


def loaders(tokenizer, path, ranks: int = 1, local: int = 2, rows: int = GLOBAL, **data) -> list[BatchLoader]:
    config = config_for(path, **data)
    training = dataclasses.replace(config.training, local_batch_size=local)
    config = dataclasses.replace(config, training=training)
    return [
        build_train_loader(config, tokenizer, global_batch_size=rows, seed=0, dp_rank=rank, dp_size=ranks)
        for rank in range(ranks)
    ]


def read(group: list[BatchLoader], steps: int) -> list[torch.Tensor]:
    """Return tokens, labels and documents of each step's global batch, in slot order."""
    found = []
    for _ in range(steps):
        batches = [next(loader) for loader in group for _ in range(loader.microbatches)]
        found.append(torch.cat([torch.stack((b.tokens, b.labels, b.documents.long())) for b in batches], dim=1))
    return found


def close(group: list[BatchLoader]) -> None:
    for loader in group:
        loader.close()


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("source", ["embedded", "jsonl", "stream"])
@pytest.mark.parametrize(
    ("ranks", "local", "workers"), [(1, 8, 0), (2, 2, 0), (4, 1, 0), (2, 4, 2), (1, 4, 1), (2, 1, 3)]
)
def test_batches_are_the_same_for_any_layout(source, ranks, local, workers, tokenizer, corpus) -> None:
    path = None if source == "embedded" else corpus
    options = {"streaming": source == "stream", "shuffle_window": 16}
    reference = loaders(tokenizer, path, **options)
    group = loaders(tokenizer, path, ranks, local, num_workers=workers, **options)
    assert_same(read(group, 12), read(reference, 12))
    state = merge_states([loader.state_dict() for loader in group])
    assert data_hash(state) == data_hash(merge_states([reference[0].state_dict()]))
    close(group + reference)


@pytest.mark.parametrize("source", ["embedded", "jsonl", "stream"])
@pytest.mark.parametrize("cut", [0, 1, 5, 13])
def test_resume_is_exact_on_another_layout(source, cut, tokenizer, corpus) -> None:
    path = None if source == "embedded" else corpus
    options = {"streaming": source == "stream", "shuffle_window": 16}
    reference = loaders(tokenizer, path, **options)
    whole = read(reference, 20)
    first = loaders(tokenizer, path, 2, 2, **options)
    read(first, cut)
    state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in first])))
    for ranks, local, workers in ((1, 8, 0), (4, 2, 0), (2, 2, 2)):
        group = loaders(tokenizer, path, ranks, local, num_workers=workers, **options)
        for loader in group:
            loader.load_state_dict(state)
        assert_same(read(group, 20 - cut), whole[cut:])
        ended = merge_states([loader.state_dict() for loader in group])
        assert data_hash(ended) == data_hash(merge_states([reference[0].state_dict()]))
        close(group)
    close(first + reference)


@pytest.mark.parametrize("source", ["jsonl", "stream"])
@pytest.mark.parametrize(("rows", "workers"), [(4, 0), (12, 0), (6, 3)])
def test_resume_with_another_global_batch_loses_no_row(source, rows, workers, tokenizer, corpus) -> None:
    options = {"streaming": source == "stream", "shuffle_window": 16}
    reference = loaders(tokenizer, corpus, **options)
    whole = torch.cat(read(reference, 15), dim=1)
    first = loaders(tokenizer, corpus, **options)
    read(first, 3)
    group = loaders(tokenizer, corpus, 2, rows // 2, rows, num_workers=workers, **options)
    for loader in group:
        loader.load_state_dict(merge_states([first[0].state_dict()]))
    found = torch.cat(read(group, 48 // rows), dim=1)
    state = merge_states([loader.state_dict() for loader in group])
    again = loaders(tokenizer, corpus, 1, GLOBAL, **options)
    again[0].load_state_dict(json.loads(json.dumps(state)))
    found = torch.cat([found, *read(again, 6)], dim=1)
    assert torch.equal(found, whole[:, 3 * GLOBAL :])
    assert data_hash(merge_states([again[0].state_dict()])) == data_hash(merge_states([reference[0].state_dict()]))
    close(group + first + reference + again)


def test_a_stream_is_not_read_from_the_start_again_after_the_global_batch_changed(tokenizer, corpus) -> None:
    options = {"streaming": True, "shuffle_window": 16}
    first = loaders(tokenizer, corpus, **options)
    read(first, 1)
    group = loaders(tokenizer, corpus, 2, 2, GLOBAL // 2, **options)
    for loader in group:
        loader.load_state_dict(merge_states([first[0].state_dict()]))
    read(group, 40)
    state = merge_states([loader.state_dict() for loader in group])
    needed = min(int(lane) + position[1] * GLOBAL for lane, position in state["positions"].items())
    assert needed > 100
    assert needed - 3 * 16 < state["stream"]["number"] <= needed
    close(group + first)


@pytest.mark.parametrize("source", ["jsonl", "stream"])
def test_lanes_hold_the_documents_in_order_and_whole(source, tokenizer, corpus) -> None:
    """What a lane's rows spell is its documents, one after the other, no token lost, over the ends of epochs."""
    options = {"streaming": source == "stream", "shuffle_window": 16}
    group = loaders(tokenizer, corpus, 2, 2, **options)
    steps = read(group, 20)
    texts = []
    for lane in range(GLOBAL):
        stream = [int(steps[0][0, lane, 0]), *(int(token) for step in steps for token in step[1, lane])]
        for step, following in pairwise(steps):
            assert step[1, lane, -1] == following[0, lane, 0]
        ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_id]
        starts = [0, *(end + 1 for end in ends)]
        pieces = [stream[start : end + 1] for start, end in zip(starts, ends, strict=False)]
        assert all(piece[0] == tokenizer.bos_id for piece in pieces)
        texts.append([tokenizer.decode(piece) for piece in pieces])
    epoch = [texts[number % GLOBAL][number // GLOBAL] for number in range(80)]
    written = sorted(json.loads(line)["text"] for line in corpus.read_text().splitlines())
    assert sorted(epoch[:40]) == sorted(epoch[40:]) == written
    assert epoch[:40] != epoch[40:]
    close(group)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_fewer_documents_than_lanes(size: int, streaming: bool, tokenizer, tmp_path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {i}"}) for i in range(size)))
    reference, group = loaders(tokenizer, path, streaming=streaming), loaders(tokenizer, path, 4, streaming=streaming)
    whole = read(reference, 6)
    assert_same(read(group, 3), whole[:3])
    state = merge_states([loader.state_dict() for loader in group])
    (again,) = loaders(tokenizer, path, streaming=streaming)
    again.load_state_dict(state)
    assert_same(read([again], 3), whole[3:])
    close([*group, *reference, again])


def test_every_document_is_whole_where_they_are_not_split(tokenizer, corpus) -> None:
    group = loaders(tokenizer, corpus, split_documents=False)
    texts = []
    for tokens, _, documents in read(group, 12):
        for row, numbers in zip(tokens, documents, strict=True):
            pieces = [row[numbers == number].tolist() for number in range(int(numbers.max()) + 1)]
            assert all(piece[0] == tokenizer.bos_id for piece in pieces)
            texts += [tokenizer.decode(piece) for piece in pieces]
    written = {json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    assert set(texts) == written
    close(group)


def test_epochs_differ_and_seeds_differ(tokenizer, corpus) -> None:
    from titan_core.data.documents import IndexedDocuments
    from titan_core.data.sources import open_source

    config = config_for(corpus)
    source = open_source("local", str(corpus), config.data, validation=False, listener=print)
    order = {
        (seed, epoch): [IndexedDocuments(source, seed, True).item(epoch * 40 + i) for i in range(40)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(texts) for texts in order.values()}) == 4
    assert len({tuple(sorted(texts)) for texts in order.values()}) == 1


def test_skipping_steps_equals_reading_them(tokenizer, corpus) -> None:
    reference, skipping = loaders(tokenizer, corpus), loaders(tokenizer, corpus)
    whole = read(reference, 6)
    skipping[0].skip_steps(4)
    assert_same(read(skipping, 2), whole[4:])
    close(reference + skipping)


def test_other_data_is_refused(tokenizer, corpus, tmp_path) -> None:
    state = merge_states([loaders(tokenizer, corpus)[0].state_dict()])
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "something else"}\n')
    with pytest.raises(DataError, match="source of the data") as caught:
        loaders(tokenizer, other)[0].load_state_dict(state)
    assert "exclude_from_loading" in (caught.value.tip or "")


def test_another_order_is_refused(tokenizer, corpus) -> None:
    options = {"streaming": True}
    state = merge_states([loaders(tokenizer, corpus, shuffle_window=16, **options)[0].state_dict()])
    for other in ({"shuffle_window": 17, **options}, {"shuffle": False, **options}):
        with pytest.raises(DataError, match=r"order of the data .*shuffled in windows of 16"):
            loaders(tokenizer, corpus, **other)[0].load_state_dict(state)


def test_ranks_that_read_the_same_data_count_once(tokenizer, corpus) -> None:
    group = loaders(tokenizer, corpus, 2)
    read(group, 2)
    states = [loader.state_dict() for loader in group]
    assert merge_states([states[0], states[0], states[1], states[1]]) == merge_states(states)
    close(group)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_background_reach_the_reader(workers: int, tokenizer, tmp_path) -> None:
    gone = tmp_path / "a.txt"
    gone.write_text("text " * 50)
    group = loaders(tokenizer, tmp_path, local=2, num_workers=workers, shuffle=False)
    gone.unlink()
    for _ in range(2):  # the second time too, instead of waiting for ever
        with pytest.raises(DataError, match="cannot read"):
            read(group, 1)
    close(group)


def test_a_thread_that_ends_in_any_way_does_not_leave_its_reader_waiting() -> None:
    class Panic(BaseException):
        """What libraries written in Rust raise when they panic: no Exception."""

    def panics():
        yield 1
        raise Panic("no entry found for key")

    for source, message in ((panics(), "Panic: no entry found for key"), (iter([1]), "ended")):
        producer = _Producer(source, ahead=2)
        assert producer.get() == 1
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                producer.get()
        producer.stop()
        producer.join()


def test_other_text_of_the_same_size_is_refused(tokenizer, tmp_path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "one"}\n' * 20)
    state = merge_states([loaders(tokenizer, path)[0].state_dict()])
    path.write_text('{"text": "two"}\n' * 20)
    with pytest.raises(DataError, match="source of the data"):
        loaders(tokenizer, path)[0].load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_text_ends_the_run(workers: int, tokenizer, tmp_path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 5)
    group = loaders(tokenizer, path, num_workers=workers)
    with pytest.raises(DataError, match="10,000 documents in a row have no text"):
        read(group, 2000)
    close(group)


def test_a_position_in_the_middle_of_a_step_is_refused(tokenizer, corpus) -> None:
    (loader,) = loaders(tokenizer, corpus)
    next(loader)
    with pytest.raises(AssertionError, match="middle of a step"):
        loader.state_dict()
    loader.close()


def test_a_large_text_file_does_not_give_equal_rows(tokenizer, tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the book\n" for i in range(30_000)))
    group = loaders(tokenizer, path)
    tokens = read(group, 1)[0][0]
    assert len({tuple(row.tolist()) for row in tokens}) == GLOBAL
    close(group)


# ------------------------------------------------------------------------------------------------ validation


def rows_of(slices) -> list[tuple[int, ...]]:
    rows = []
    for one in slices:
        for batch in one:
            rows += [
                tuple(r.tolist())
                for r, labels in zip(batch.tokens, batch.labels, strict=True)
                if (labels != -100).any()
            ]
    return sorted(rows)


@pytest.mark.parametrize("steps", [3, -1])
def test_validation_rows_do_not_depend_on_the_ranks(steps: int, tokenizer, corpus) -> None:
    config = config_for(None)
    validation = dataclasses.replace(
        config.validation, dataset="local", dataset_path=str(corpus), seq_len=SEQ_LEN, local_batch_size=4, steps=steps
    )
    config = dataclasses.replace(config, validation=validation)
    alone = [build_validation_slice(config, tokenizer)]
    for ranks in (2, 3):
        several = [build_validation_slice(config, tokenizer, dp_rank=r, dp_size=ranks) for r in range(ranks)]
        assert rows_of(several) == rows_of(alone)
        assert len({len(list(one)) for one in several}) == 1
    assert rows_of(alone) == rows_of(alone)
