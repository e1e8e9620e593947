"""From files and flags to a checked config."""

import os
from pathlib import Path

import pytest

from titan_core.config.fields import fields, get
from titan_core.config.load import from_dict, load, to_dict
from titan_core.runtime.errors import ConfigError, Problem


def problems(target: Path | str | None, *flags: tuple[str, str | None]) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(None if target is None else str(target), list(flags))
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ files

# text -> (line of the problem or None, part of its message, part of its tip)
BROKEN = {
    "unknown key": ("[training]\nstps = 1", 2, "unknown key `training.stps`", "training.steps"),
    "unknown section": ("[optimiser]\nlr = 1", 2, "unknown key `optimiser.lr`", "optimizer.lr"),
    "empty unknown section": ("[foo]", 1, "unknown key `foo`", "config list"),
    "section as value": ("training = 5", 1, "`training` is a section", "config list training."),
    "section as list": ("[[training]]\nsteps = 1", 1, "`training` is a section", ""),
    "table as value": ("[training.steps]\nx = 1", 1, "expected integer, got table", "integer"),
    "text for integer": ("[training]\nsteps = 'x'", 2, "expected integer, got string", "integer, e.g. `10000`"),
    "boolean for integer": ("[training]\nsteps = true", 2, "cannot be `true`", "integer"),
    "fraction for integer": ("[training]\nsteps = 5.5", 2, "cannot be `5.5`", "integer"),
    "integer for boolean": ("[compile]\nenable = 1", 2, "expected true or false, got integer", ""),
    "date": ("[training]\nsteps = 2020-01-01", 2, "got date", "integer"),
    "too small": ("[training]\nsteps = 0", 2, ">= 1", ""),
    "not a number": ("[optimizer]\nlr = nan", 2, "cannot be `nan`", ""),
    "infinite": ("[optimizer]\nlr = inf", 2, "finite", ""),
    "more than 64 bits": ("[training]\nsteps = " + "9" * 30, 2, "64 bits", ""),
    "zero byte": ('[job]\ndump_folder = "a\\u0000"', 2, "zero byte", ""),
    "choice": ("[optimizer]\nname = 'adamw'", 2, "cannot be `adamw`", "did you mean `AdamW`?"),
    "choice in a list": ("[compile]\ncomponents = ['model', 'los']", 2, "item 2", "did you mean `loss`?"),
    "type in a list": ("[optimizer]\nno_decay_roles = [1]", 2, "expected string, got integer in item 1", "string"),
    "key of a table in a list": (
        "[[optimizer.param_groups]]\npattern = 'x'\nlr_facto = 1", 1, "did you mean `lr_factor`?", "pattern",
    ),
    "type in a table in a list": (
        "[[optimizer.param_groups]]\npattern = 'x'\nlr_factor = 'y'", 1, "item 1, lr_factor", "",
    ),
    "table that is none": ("[model]\nargs = 5", 2, "expected table, got integer", ""),
    "dotted key": ("training.steps = 'x'", 1, "training.steps", ""),
    "inline table": ("x = 1\ntraining = {steps = 'y'}", 2, "training.steps", ""),
    "quoted key": ("['training']\n'steps' = 'x'", 2, "training.steps", ""),
    "line after a long string": (
        "[job]\ndescription = '''\n[training]\nsteps = 1'''\n[training]\nsteps = 'x'", 6, "training.steps", "",
    ),
    "escapes in a key": ('"\\u001b[31mred" = 1', None, "`\\x1b[31mred`", ""),
    "extends a number": ("extends = 3", 1, "takes the name of a recipe", "llama3_8b"),
    "extends nothing": ("extends = ''", 1, "takes the name of a recipe", ""),
    "extends a stranger": ("\nextends = 'llama3_9b'", 2, "no such recipe or file", "llama3_8b"),
    "extends a folder": ("extends = '.'", 1, "is a folder", "config show"),
    "text without quotes": ("[optimizer]\nname = AdamW", 2, "not valid TOML", '"AdamW"'),
    "Python's True": ("[compile]\nenable = True", 2, "not valid TOML", "`true`"),
    "none": ("[training]\nseed = none", 2, "not valid TOML", "leave the key out"),
    "YAML": ("training:\n  steps: 5", 1, "not valid TOML", "key = value"),
    "deep": ("x = " + "[" * 5000 + "]" * 5000, None, "400 levels", ""),
    "huge": ("x = " + "9" * 5000, None, "4,300 digits", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_a_file_is_named_with_its_line(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, line, said, advised = BROKEN[name]
    path = write(tmp_path / "a.toml", text)
    found = problems(path)[-1]
    assert said in found.message
    assert advised in (found.tip or "")
    place = f"{path}:{line}" if line else str(path)
    assert found.where is not None
    assert found.where == place or found.where.startswith(f"{place}:")
    assert found.message.isprintable()
    assert len(found.message) < 250


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[training]\nstps = 1\nsteps = 'x'\n[foo]\nbar = 1\n")
    found = problems(path, ("optimizer.lrr", "1"), ("compile.enable", "maybe"), ("training.seq_len", None))
    assert [p.where for p in found] == [
        "--optimizer.lrr", "--training.seq_len", f"{path}:2", f"{path}:3", f"{path}:5", "--compile.enable",
    ]  # fmt: skip


def test_a_file_overrides_what_it_extends_and_flags_override_it(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "extends = 'llama3_8b'\n[training]\nsteps = 5\nseq_len = 16\n[optimizer]\nlr = 1")
    path = write(tmp_path / "mine.toml", "extends = 'base.toml'\n[training]\nsteps = 6\n")
    found = load(str(path), [("optimizer.lr", "2")])
    config = found.config
    assert (config.model.flavor, config.training.seq_len, config.training.steps) == ("8B", 16, 6)
    assert config.optimizer.lr == 2.0
    assert found.sources["model.flavor"].where.startswith("recipe llama3_8b:")
    assert found.sources["training.seq_len"].where == f"{tmp_path / 'base.toml'}:4"
    assert found.sources["training.steps"].where == f"{path}:3"
    assert found.sources["optimizer.lr"].where == "--optimizer.lr"
    assert "training.max_norm" not in found.sources


@pytest.mark.parametrize("way", ["a.toml", "../sub/a.toml", "b.toml", "link.toml"])
def test_a_file_that_extends_itself_is_refused(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    path = write(folder / "a.toml", f"extends = '{way}'\n")
    write(folder / "b.toml", "extends = 'a.toml'\n")
    os.symlink(path, folder / "link.toml")
    assert "extends itself" in problems(path)[0].message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "none.toml")[0].message
    assert "is a folder" in problems(tmp_path)[0].message
    assert "no such" in problems("x" * 5000)[0].message
    assert "no such" in problems("a\0b")[0].message
    (tmp_path / "a.toml").write_bytes(b"\x00\xff\xfe")
    assert "not a text file" in problems(tmp_path / "a.toml")[0].message


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes("\ufeff[training]\r\nsteps = 5\r\n".encode())
    found = load(str(path))
    assert found.config.training.steps == 5
    assert found.sources["training.steps"].where == f"{path}:2"


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("key", "word", "expected"),
    [
        ("training.steps", "1e3", 1000),
        ("training.steps", "1_000", 1000),
        ("training.steps", "0x10", 16),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "1.", 1.0),
        ("optimizer.lr", "3E-4", 3e-4),
        ("training.seed", "none", None),
        ("lr_scheduler.decay_ratio", "", None),
        ("compile.enable", None, True),
        ("compile.enable", "FALSE", False),
        ("compile.enable", "0", False),
        ("checkpoint.no_verify", None, False),
        ("compile.components", "model,loss", ["model", "loss"]),
        ("compile.components", "['loss']", ["loss"]),
        ("compile.components", "", []),
        ("training.dataset", "5", "5"),
        ("training.dataset", "true", "true"),
        ("job.description", "a = [b", "a = [b"),
        ("model.args", "{n_layers = 2}", {"n_layers": 2}),
        ("model.args.n_layers", "2", {"n_layers": 2}),
        ("model.args.tied", None, {"tied": True}),
        ("model.args.rope_scaling", "none", {"rope_scaling": None}),
        ("model.args.rope_scaling.factor", "2", {"rope_scaling": {"factor": 2}}),
        ("training.seq-len", "8", 8),
    ],
)
def test_words_become_values(key: str, word: str | None, expected: object) -> None:
    found = load(None, [(key, word)])
    (changed,) = found.sources
    assert get(found.config, changed) == expected
    assert type(get(found.config, changed)) is type(expected)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("training.steps", "1.5"),
        ("training.steps", "many"),
        ("training.steps", "9" * 5000),
        ("training.steps", "true"),
        ("training.steps", "-1"),
        ("optimizer.lr", "none"),
        ("optimizer.lr", "1e999"),
        ("optimizer.lr", "0.1.2"),
        ("compile.enable", "yes"),
        ("compile.components", "[1"),
        ("model.args", "5"),
        ("optimizer.param_groups", "[{patern = 'x'}]"),
    ],
)
def test_words_that_do_not_fit_are_refused(key: str, word: str) -> None:
    (found,) = problems(None, (key, word))
    assert found.where == f"--{key}"
    assert f"`{key}` cannot be" in found.message
    assert found.tip


def test_sizes_add_up_over_file_and_flags(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[model.args]\nn_layers = 2\nrope_scaling = {factor = 4, low_freq_factor = 1}\n")
    found = load(str(path), [("model.args.n_heads", "4"), ("model.args.rope_scaling.factor", "2")])
    assert found.config.model.args == {
        "n_layers": 2,
        "n_heads": 4,
        "rope_scaling": {"factor": 2, "low_freq_factor": 1},
    }


# ------------------------------------------------------------------------------------------------ the rest


def test_a_config_survives_being_saved() -> None:
    config = load("llama3_8b", [("optimizer.param_groups", "[{pattern = 'x', lr_factor = 2}]")]).config
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"unknown key `training\.nothing`"):
        from_dict({"training": {"nothing": 1}})


def test_defaults_are_valid() -> None:
    assert from_dict(to_dict(load(None).config)) == load(None).config
    assert all(get(load(None).config, key) == field.default for key, field in fields().items())


def test_old_words_are_carried_over_or_explained() -> None:
    found = load(None, [("model.tokenizer_path", "assets/llama")])
    assert found.config.model.hf_assets_path == "assets/llama"
    assert any("deprecated" in note for note in found.notes)
    assert "hf_assets_path" in (problems(None, ("model.tokenizer_path", "a/tokenizer.model"))[0].tip or "")


def test_a_run_that_is_all_warmup_is_remarked() -> None:
    assert any("only rises" in note for note in load(None, [("training.steps", "10")]).notes)
    assert load("llama3_debugmodel").notes == []
