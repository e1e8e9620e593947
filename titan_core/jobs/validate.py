"""`titan validate`: staged checks of checkpoints and data, and the loss of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from titan_core.checkpoint import find_step, read_shared, tensor_index, verify
from titan_core.config.load import Resolved
from titan_core.config.schema import Data
from titan_core.data.build import documents_of
from titan_core.data.documents import IndexedDocuments, StreamedDocuments
from titan_core.data.fixed_slice import FixedSlice
from titan_core.data.lanes import LaneReader
from titan_core.data.open_pictures import open_pictures
from titan_core.data.samples import SampleReader
from titan_core.data.sources import Stream, open_source
from titan_core.data.tokenizer import load_tokenizer
from titan_core.jobs.load import load_language, model_of, tokenizer_of
from titan_core.jobs.stages import Report
from titan_core.models import resolve
from titan_core.nn.layers import set_compute_dtype
from titan_core.runtime.errors import CheckpointError, DataError, TitanError
from titan_core.runtime.events import Listener, Progress, silent
from titan_core.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class LossResult:
    """Loss in nats a token, its exponential, and bits per byte of the text."""

    checkpoint: str
    data: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    sequences: int


def loss(
    checkpoint: str,
    data: str,
    *,
    seq_len: int | None = None,
    batches: int = -1,
    batch_size: int = 8,
    text_key: str = "text",
    device: str | None = None,
    listener: Listener = silent,
) -> LossResult:
    """Measure a checkpoint's loss on a data set: `embedded` (its held-out part), a name, or local files."""
    trained = load_language(checkpoint, device=device, dtype=torch.float32)
    where = next(trained.model.parameters()).device
    if where.type == "cuda":
        set_compute_dtype(trained.model, torch.bfloat16)
    settings = Data(text_key=text_key, shuffle=False)
    name, path = (data, None) if _is_name(data) else ("local", data)
    source = open_source(name, path, settings, validation=True, listener=listener)
    length = seq_len or trained.shared["config"]["training"]["seq_len"]
    rows = FixedSlice(
        _in_order(source),
        trained.tokenizer,
        seq_len=length,
        batch_size=batch_size,
        num_batches=batches,
        dp_rank=0,
        dp_size=1,
    )
    masks = getattr(trained.sizes, "attention_mask", "causal") == "block_causal"
    task = CausalLM(trained.model, document_masks=masks)
    total, tokens, sequences, num_bytes = 0.0, 0, 0, 0
    with torch.inference_mode():
        for batch in rows:
            total += task(batch.to(where)).item()
            tokens += int(task.weight(batch).item())
            sequences += int((batch.labels != -100).any(1).sum().item())
            num_bytes += _bytes_of(batch.labels, trained.tokenizer)
            listener(Progress("validate", sequences, None, "sequences"))
    mean = total / max(tokens, 1)
    return LossResult(
        trained.path,
        data,
        mean,
        math.exp(min(mean, 700.0)),
        total / math.log(2) / max(num_bytes, 1),
        tokens,
        sequences,
    )


def checkpoint(path: str, *, world_size: int | None = None) -> Report:
    """Check a checkpoint: complete, undamaged, finite, of the model that it names, resumable."""
    report = Report()
    found: dict[str, Any] = {}

    def complete() -> str:
        found["path"] = find_step(path)
        found["shared"] = read_shared(found["path"])
        return f"{found['path']}, step {found['shared']['step']}, {found['shared']['tokens']:,} tokens"

    if not report.stage("complete", complete):
        return report
    report.stage("undamaged", lambda: _undamaged(found["path"]))
    report.stage("model", lambda: _names_and_shapes(found["path"], found["shared"]))
    if report.ok and model_of(found["shared"], found["path"])[0].task != "causal_lm":
        report.skipped("tokenizer", "not a language model")
    else:
        report.stage("tokenizer", lambda: f"{tokenizer_of(found['path'], found['shared']).vocab_size:,} tokens")
    report.stage("resumable", lambda: _resumable(found["path"], found["shared"], world_size))
    return report


def data(resolved: Resolved, *, samples: int = 4, listener: Listener = silent) -> tuple[Report, list[str]]:
    """Check a config's data: reachable, known tokens, rows that lose nothing. Returns decoded samples too."""
    report, decoded, found = Report(), [], {}
    config = resolved.config
    if resolve(config.model)[0].task == "flow_matching":
        return _pictures(resolved, samples, listener)

    def opened() -> str:
        training = config.training
        found["source"] = open_source(
            training.dataset, training.dataset_path, config.data, validation=False, listener=listener
        )
        if isinstance(found["source"], Stream):
            return "a stream"
        return f"{len(found['source']):,} documents"

    def tokenized() -> str:
        found["tokenizer"] = load_tokenizer(config.model.hf_assets_path, listener)
        known, vocab = found["tokenizer"].vocab_size, resolve(config.model)[1].vocab_size
        if known > vocab:
            tip = f"--model.args.vocab_size {known}"
            raise CheckpointError(f"the tokenizer knows {known} tokens, the model {vocab}", tip=tip)
        return f"{known:,} tokens, the model has {vocab:,}"

    both = [report.stage("reachable", opened), report.stage("tokenizer", tokenized)]
    if all(both):
        report.stage("rows", lambda: _rows(found["source"], found["tokenizer"], resolved, samples, decoded))
    return report, decoded


def _pictures(resolved: Resolved, samples: int, listener: Listener) -> tuple[Report, list[str]]:
    """Check pictures with captions: reachable, readable, large enough. Returns captions too."""
    report, captions, found = Report(), [], {}
    config, training = resolved.config, resolved.config.training

    def opened() -> str:
        found["source"] = open_pictures(
            training.dataset, training.dataset_path, config.data,
            size=training.img_size, validation=False, listener=listener,
        )  # fmt: skip
        return f"{len(found['source']):,} pictures" if hasattr(found["source"], "__len__") else "a stream"

    def readable() -> str:
        documents = documents_of(found["source"], 0, 1, False, lambda number: True, infinite=False)
        reader, bad = SampleReader(documents, None, training.img_size, 1, {}), []
        rows: list[Any] = [one.row for number in range(max(samples, 64)) if (one := reader.row(number))]
        bad = [row for row in rows if row.problem is not None]
        captions.extend(row.caption for row in rows[:samples])
        if len(bad) == len(rows):
            first = f": {bad[0].problem.reason} ({bad[0].problem.where})" if bad else ""
            raise DataError(f"none of the first {len(rows)} can be used{first}", where="training.dataset")
        return f"{len(rows) - len(bad)} of the first {len(rows)} can be used at {training.img_size} pixels"

    if report.stage("reachable", opened):
        report.stage("pictures", readable)
    return report, captions


def _undamaged(path: str) -> str:
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{len(problems)} problems: " + "; ".join(problems[:4]))
    return "all hashes match, all numbers are finite"


def _names_and_shapes(path: str, shared: dict[str, Any]) -> str:
    chosen, sizes = model_of(shared, path)
    stored = tensor_index(path)
    declared = {p.name: p.shape for p in chosen.parameters(sizes) if p.tied_to is None}
    missing = [name for name in declared if name not in stored]
    wrong = [name for name, shape in declared.items() if name in stored and stored[name][0] != tuple(shape)]
    unknown = [name for name in stored if name not in declared and not name.startswith("optimizer.")]
    if missing or wrong or unknown:
        raise CheckpointError(f"missing {missing[:4]}, of another shape {wrong[:4]}, unknown {unknown[:4]}")
    return f"{chosen.name}, {len(declared)} parameters"


def _resumable(path: str, shared: dict[str, Any], world_size: int | None) -> str:
    stored = tensor_index(path)
    if not any(name.startswith("optimizer.state.") for name in stored):
        raise CheckpointError("weights only: a run can start from it, not go on", where=path)
    local, rows = shared["config"]["training"]["local_batch_size"], shared["global_batch"]
    if world_size is not None and rows % (local * world_size):
        raise CheckpointError(
            f"{rows} sequences a step do not divide into {local} x {world_size} ranks",
            tip="another --training.local_batch_size, or a global batch of your choice",
        )
    return f"optimizer state and data position are there; {rows} sequences a step"


def _rows(source: Any, tokenizer: Any, resolved: Resolved, samples: int, decoded: list[str]) -> str:
    """Make rows as training would and look at them."""
    seq_len = resolved.config.training.seq_len
    reader = LaneReader(_in_order(source), tokenizer, lanes=1, seq_len=seq_len, split_documents=True, positions={})
    last = None
    for number in range(max(samples, 2)):
        made = reader.row(number)
        if made is None:
            break
        if last is not None and made.row.tokens[0] != last:
            raise TitanError(f"row {number} does not begin where the one before it ended")
        last = made.row.labels[-1]
        if number < samples:
            decoded.append(tokenizer.decode(made.row.tokens.tolist(), skip_special=False))
    if last is None:
        raise TitanError("there is not one row in the data", tip="is it empty?")
    return f"rows of {seq_len} tokens follow one another without a gap"


def _in_order(source: Any) -> Any:
    if isinstance(source, Stream):
        return StreamedDocuments(source, 0, 1024, False, lambda number: True, infinite=False)
    return IndexedDocuments(source, 0, shuffle=False, infinite=False)


def _is_name(data: str) -> bool:
    import os

    return not os.path.exists(data) and "*" not in data


def _bytes_of(labels: torch.Tensor, tokenizer: Any) -> int:
    """Return the bytes of the text that the counted labels spell; special tokens spell nothing."""
    kept = [row[row != -100].tolist() for row in labels]
    return sum(len(tokenizer.decode(ids).encode("utf-8", errors="replace")) for ids in kept if ids)
