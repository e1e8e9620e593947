"""The schema as a table, and suggestions for keys that are none."""

import random

import pytest

from titan_core.config.fields import ALIASES, SECTION_ALIASES, fields, get, replace, sections, suggest
from titan_core.config.load import load


@pytest.mark.parametrize("seed", range(3))
def test_typos_are_recognised(seed: int) -> None:
    dice = random.Random(seed)
    keys = list(fields())
    right = 0
    for _ in range(200):
        key = dice.choice(keys)
        at = dice.randrange(len(key) - 1)
        broken = [
            key[:at] + key[at + 1 :],
            key[:at] + key[at + 1] + key[at] + key[at + 2 :],
            key[:at] + dice.choice("aeiqxz") + key[at:],
            key[:at] + dice.choice("aeiqxz") + key[at + 1 :],
        ][dice.randrange(4)]
        right += broken in fields() or suggest(broken) == key
    assert right >= 190


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", "optimizer.lr"),
        ("optim.learning-rate", "optimizer.lr"),
        ("training.lr", "optimizer.lr"),
        ("train.steps", "training.steps"),
        ("trainer.max_steps", "training.steps"),
        ("training.batch_size", "training.local_batch_size"),
        ("validation.batch_size", "validation.local_batch_size"),
        ("eval.freq", "validation.freq"),
        ("parallel.tp", "parallelism.tensor_parallel_degree"),
        ("parallelism.fsdp", "parallelism.data_parallel_shard_degree"),
        ("optimizer.warmup", "lr_scheduler.warmup_steps"),
        ("training.warmup_steps", "lr_scheduler.warmup_steps"),
        ("training.num_workers", "data.num_workers"),
        ("training.compile", "compile.enable"),
        ("training.optimizer", "optimizer.name"),
        ("profile.enable", "profiling.enable_profiling"),
        ("ac.mode", "activation_checkpoint.mode"),
        ("job.output_dir", "job.dump_folder"),
        ("checkpoint.save_freq", "checkpoint.interval"),
        ("TRAINING.STEPS", "training.steps"),
        ("foo.bar", None),
        ("", None),
        ("...", None),
    ],
)
def test_words_of_other_toolkits_are_understood(key: str, expected: str | None) -> None:
    assert suggest(key) == expected


def test_aliases_name_real_keys() -> None:
    assert set(ALIASES.values()) <= set(fields())
    assert set(SECTION_ALIASES.values()) <= set(sections())


def test_every_key_and_section_has_help() -> None:
    assert [key for key, field in fields().items() if len(field.help) < 10] == []
    assert [key for key, text in sections().items() if len(text) < 5] == []


def test_replace_changes_only_what_it_names() -> None:
    config = load(None).config
    changed = replace(config, {"training.steps": 7, "quantize.linear.float8.emulate": True})
    differing = {key for key in fields() if get(config, key) != get(changed, key)}
    assert differing == {"training.steps", "quantize.linear.float8.emulate"}
    assert config.training.steps != 7
