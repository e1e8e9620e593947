"""`titan validate config`: what a config promises, checked without torch and without reading any data."""

from __future__ import annotations

from titan_core.config.checks import check, check_layout
from titan_core.config.load import Resolved
from titan_core.data.local_files import local_files
from titan_core.data.sources import NAMED, NAMES, open_source
from titan_core.data.tokenizer import BUILT_IN_VOCAB, load_tokenizer
from titan_core.estimation.flops import count_parameters
from titan_core.estimation.memory import GIB, rank_memory
from titan_core.jobs.stages import Report
from titan_core.models import problems, resolve
from titan_core.parallel import legal
from titan_core.parallel.mesh import Layout
from titan_core.runtime.errors import ConfigError, DataError, Problem
from titan_core.runtime.events import silent

_NOT_FETCHED = "from the Hub (not fetched: `titan validate data`)"
STAGES = ("keys and types", "rules", "layout", "model", "tokenizer", "data", "memory")


def run(resolved: Resolved, world_size: int | None) -> Report:
    """Check rules across sections, the layout on `world_size` ranks, the model's sizes, tokenizer, data, memory."""
    report = Report()
    set_by = {source.kind for source in resolved.sources.values()}
    report.stage(STAGES[0], lambda: f"{len(resolved.sources)} set, by {' and '.join(sorted(set_by)) or 'nobody'}")
    report.stage(STAGES[1], lambda: _rules(check(resolved)))
    if world_size is None:
        report.skipped(STAGES[2], "give the number of ranks with --world")
        fits = True
    else:
        fits = report.stage(STAGES[2], lambda: _layout(resolved, world_size))
    known = report.stage(STAGES[3], lambda: _model(resolved))
    report.stage(STAGES[4], lambda: _tokenizer(resolved, known))
    report.stage(STAGES[5], lambda: _data(resolved))
    if known and fits:
        report.stage(STAGES[6], lambda: _memory(resolved, world_size or 1))
    else:
        report.skipped(STAGES[6], "needs a valid layout and model")
    return report


def unreadable(found: list[Problem]) -> Report:
    """Return the report on a config whose keys or values are wrong: nothing after that can be checked."""
    report = Report()
    report.failed(STAGES[0], found)
    for name in STAGES[1:]:
        report.skipped(name, "needs valid keys")
    return report


def _rules(found: list[Problem]) -> str:
    if found:
        raise ConfigError(found)
    return "sections agree"


def _layout(resolved: Resolved, world_size: int) -> str:
    """Check the degrees, and whether the model divides by them, if it is one."""
    _rules(check_layout(resolved, world_size))
    layout = Layout.of(resolved.config.parallelism, world_size)
    if not problems(resolved.config.model):
        _rules(legal.problems(resolved.config, layout, *resolve(resolved.config.model)))
    return f"{world_size} ranks: {layout}"


def _model(resolved: Resolved) -> str:
    config = resolved.config
    family, sizes = resolve(config.model)
    for section, length in (("training", config.training.seq_len), ("validation", config.validation.seq_len)):
        if (
            family.task == "causal_lm"
            and length > sizes.max_seq_len
            and (section == "training" or config.validation.enable)
        ):
            message = f"`{section}.seq_len` {length} is longer than the model's max_seq_len, {sizes.max_seq_len}"
            tip = f"lower it, or --model.args.max_seq_len {length}"
            raise ConfigError([Problem(f"{section}.seq_len", message, tip=tip)])
    total = count_parameters(family.parameters(sizes)).total
    return f"{family.name} {config.model.flavor}, {total:,} parameters"


def _tokenizer(resolved: Resolved, known_model: bool) -> str:
    path = resolved.config.model.hf_assets_path
    if known_model and resolve(resolved.config.model)[0].task != "causal_lm":
        encoder = resolved.config.encoder
        return f"those of the text encoders {encoder.t5_encoder} and {encoder.clip_encoder}"
    size = load_tokenizer(path).vocab_size if path else BUILT_IN_VOCAB
    text = f"{size:,} tokens" + (f" in {path}" if path else ", built in")
    vocab = resolve(resolved.config.model)[1].vocab_size if known_model else None
    if vocab is not None and size > vocab:
        raise DataError(f"the tokenizer knows {size} tokens, the model {vocab}", tip=f"--model.args.vocab_size {size}")
    return text


def _data(resolved: Resolved) -> str:
    config = resolved.config
    found = [_data_set(config.training.dataset, config.training.dataset_path, resolved, validation=False)]
    if config.validation.enable:
        found.append(_data_set(config.validation.dataset, config.validation.dataset_path, resolved, validation=True))
    return "; ".join(found)


def _data_set(name: str, path: str | None, resolved: Resolved, *, validation: bool) -> str:
    """Say what is there of a data set, without fetching it."""
    purpose = "validation on" if validation else "training on"
    if _pictures(resolved):
        return f"{purpose} {_picture_set(name, path, resolved, validation=validation)}"
    if path and name != "c4_test":
        files = local_files(path, f"{'validation' if validation else 'training'}.dataset_path")
        size = sum(file.stat().st_size for file in files)
        return f"{purpose} {len(files)} files in {path}, {size / 1e6:,.1f} MB"
    if name in NAMED or (name not in NAMES and "/" in name):
        return f"{purpose} {name}, {_NOT_FETCHED}"
    open_source(name, path, resolved.config.data, validation=validation, listener=silent)
    return f"{purpose} {name}"


def _picture_set(name: str, path: str | None, resolved: Resolved, *, validation: bool) -> str:
    from titan_core.data import open_pictures as pictures  # numpy: 0.1 s

    if not path and (name in pictures.NAMED or (name not in pictures.NAMES and "/" in name)):
        return f"{name}, {_NOT_FETCHED}"
    data, size = resolved.config.data, resolved.config.training.img_size
    found = pictures.open_pictures(name, path, data, size=size, validation=validation, listener=silent)
    count = f"{len(found):,} pictures of" if hasattr(found, "__len__") else "a stream of"
    return f"{count} {path or name}"


def _pictures(resolved: Resolved) -> bool:
    return not problems(resolved.config.model) and resolve(resolved.config.model)[0].task == "flow_matching"


def _memory(resolved: Resolved, world_size: int) -> str:
    config = resolved.config
    family, sizes = resolve(config.model)
    layout = Layout.of(config.parallelism, world_size)
    vocab, lengths = getattr(sizes, "vocab_size", 0), family.lengths(config)
    memory = rank_memory(config, family.parameters(sizes), family.attentions(sizes), vocab, layout, lengths)
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in memory.parts().items())
    return f"about {memory.total / GIB:.2f} GiB a rank: {parts}"
