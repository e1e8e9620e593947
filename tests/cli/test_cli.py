"""The command line as a user meets it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import apart
from titan_cli.main import run
from titan_cli.overrides import split
from titan_core.config.catalog import describe, recipes
from titan_core.config.fields import fields
from titan_core.config.values import choices

COMMANDS = [
    [],
    ["train"],
    ["validate"],
    ["validate", "config"],
    ["validate", "checkpoint"],
    ["validate", "data"],
    ["validate", "loss"],
    ["config"],
    ["config", "show"],
    ["generate"],
    ["generate", "llm"],
    ["estimate-flops"],
    ["bench"],
    ["bench", "moe-gemm"],
    ["bench", "all"],
    ["bench-kernels"],
    ["bench-kernels", "collectives"],
    ["doctor"],
    ["completions"],
]
HEAVY = ("torch", "numpy", "triton", "transformers", "datasets", "tokenizers", "rich", "pydantic")


def call(*words: str, capsys) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, stdout, stderr."""
    before, sys.argv = sys.argv, ["titan", *words]
    try:
        code = run(list(words))
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err


def titan(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a process of its own."""
    full = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")} | env
    return subprocess.run(
        [sys.executable, "-m", "titan_cli", *words], capture_output=True, text=True, cwd=cwd, env=full, timeout=120
    )


# ------------------------------------------------------------------------------------------------ help and start


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "titan")
def test_help_is_short_and_has_an_example(command: list[str], capsys) -> None:
    code, out, _ = call(*command, "--help", capsys=capsys)
    assert code == 0
    assert out.startswith("Usage: titan")
    assert len(out.splitlines()) <= 60
    assert max(map(len, out.splitlines())) <= 100
    if command and len(command) == 1:
        assert "Example" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "--list"],
        ["config", "show", "llama3_8b", "--why"],
        ["config", "schema"],
        ["config", "explain", "optimizer.lr"],
        ["validate", "--help"],
        ["train", "nosuch"],
        ["completions", "show", "zsh"],
        ["estimate-flops", "llama3_8b", "--gpus", "8", "--gpu", "h100", "--fit"],
        ["bench", "moe-gemm", "--help"],
        ["bench", "moe-gemm", "--shapes", "mixtrl"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from titan_cli.main import run; sys.argv = ['titan', *sys.argv[1:]]; run(sys.argv[1:]); "
        f"print('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "loaded: []" in done.stderr


def test_completion_imports_nothing_heavy() -> None:
    code = (
        "import sys; from titan_cli.main import main; main(['train', '--optimizer.l']); "
        f"print('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    env = {**os.environ, "_TITAN_COMPLETE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "--optimizer.lr\tPeak learning rate." in done.stdout
    assert "loaded: []" in done.stdout


# ------------------------------------------------------------------------------------------------ errors

MISTAKES = {
    "unknown command": (["tran"], 2, "did you mean `train`"),
    "unknown subcommand": (["config", "shw"], 2, "did you mean `show`"),
    "unknown option": (["train", "--dry-rnu"], 2, "did you mean `--dry-run`"),
    "option with several neighbours": (
        ["generate", "flux", "--checkpoint", "x", "--quantise", "y"],
        2,
        "did you mean `--quantize`",
    ),
    "not an integer": (["train", "--until", "x"], 2, "'x' is not a valid integer"),
    "not a time": (["train", "--grace", "soon"], 2, "--grace"),
    "no port to meet at": (["train", "--nnodes", "2", "--rdzv", "node01"], 2, "HOST:PORT"),
    "port that is none": (["train", "--nnodes", "2", "--rdzv", "node01:x"], 2, "HOST:PORT"),
    "unknown recipe": (["train", "llama3_debugmodl"], 2, "llama3_debugmodel"),
    "missing file": (["train", "runs/none.toml"], 2, "no such file"),
    "unknown key": (["train", "--optimizer.learning_rate", "1"], 2, "optimizer.lr"),
    "unknown section": (["train", "--optimiser.lr", "1"], 2, "optimizer.lr"),
    "not a number": (["train", "--training.steps", "many"], 2, "training.steps"),
    "negative": (["train", "--training.steps", "-3"], 2, ">= 1"),
    "fraction for integer": (["train", "--training.seq_len", "2.5"], 2, "training.seq_len"),
    "no value": (["train", "--training.steps"], 2, "needs a value"),
    "not a choice": (["train", "--optimizer.name", "SGD"], 2, "AdamW, Adam"),
    "near a choice": (["train", "--activation_checkpoint.mode", "ful"], 2, "did you mean `full`"),
    "not a boolean": (["train", "--compile.enable=perhaps"], 2, "compile.enable"),
    "batch does not divide": (
        ["train", "--training.global_batch_size", "12", "--training.local_batch_size", "8"],
        2,
        "try 8 or 16",
    ),
    "impossible degrees": (
        ["train", "--nproc", "5", "--parallelism.data_parallel_replicate_degree", "2"],
        2,
        "try `fsdp 5` or `replicate 5`",
    ),
    "not supported": (["train", "--optimizer.early_step_in_backward"], 2, "early_step_in_backward = true"),
    "experts that are not there": (
        ["train", "--nproc", "2", "--parallelism.expert_parallel_degree", "2"],
        2,
        "no experts to split over 2 ranks",
    ),
    "pieces of a sequence": (
        ["train", "--nproc", "2", "--parallelism.tensor_parallel_degree", "2", "--training.seq_len", "255"],
        2,
        "254 or 256",
    ),
    "stages without a module": (
        [
            *("train", "--nproc", "2", "--parallelism.pipeline_parallel_degree", "2"),
            *("--parallelism.module_fqns_per_model_part", '[["tok_embeddings"], ["norm", "output"]]'),
        ],
        2,
        "missing: layers.0",
    ),
    "unknown shape": (["bench", "moe-gemm", "--shapes", "mixtrl"], 2, "did you mean `mixtral`"),
    "shape without rows": (["bench", "moe-gemm", "--shapes", "0,8,8,2"], 2, "at least 1"),
    "unknown pass": (["bench", "moe-gemm", "--pass", "fwd,dv"], 2, "one of fwd, dx, dw"),
    "unknown dtype": (["bench-kernels", "moe-gemm", "--dtype", "int8"], 2, "bf16, fp8"),
    "skew above one": (["bench", "moe-gemm", "--imbalance", "2"], 2, "--imbalance"),
    "unknown backend": (["bench", "pointwise", "--backend", "triton"], 2, "compile, eager, titan, training"),
    "picture that is none": (["bench", "quant", "--plot", "a.txt"], 2, ".png, .svg or .pdf"),
    "alone": (["bench", "collectives", "--nproc", "1"], 2, "--nproc 2"),
    "nproc": (["train", "--nproc", "x"], 2, "--nproc"),
    "unknown model": (["train", "--model.name", "lama3"], 2, "did you mean `llama3`"),
    "unknown flavor": (["train", "--model.flavor", "9B"], 2, "8B"),
    "unknown size": (["train", "--model.args.n_layer", "2"], 2, "n_layers"),
    "size of another type": (["train", "--model.args.n_layers", "two"], 2, "model.args.n_layers"),
    "budget without compiler": (["train", "--activation_checkpoint.mode", "memory_budget"], 2, "compile.enable"),
    "bad option of recompute": (["train", "--activation_checkpoint.selective_ac_option", "x"], 2, "op"),
    "unknown role": (["train", "--optimizer.no_decay_roles", "norms"], 2, "no parameter role `norms`"),
    "missing module": (["train", "--experimental.custom_import", "no.such"], 2, "no.such"),
    "unknown allowed key": (["train", "--allow-change", "optimizer.lrr"], 2, "optimizer.lr"),
    "missing checkpoint": (["generate", "llm", "--checkpoint", "none", "--prompt", "x"], 1, "nothing at"),
    "no prompt": (["generate", "llm", "--checkpoint", "none"], 2, "--prompt"),
    "bad ids": (["generate", "llm", "--checkpoint", "none", "--prompt-ids", "1,b"], 2, "1,b"),
    "missing prompts": (["generate", "llm", "--checkpoint", "none", "--prompts", "none.txt"], 2, "none.txt"),
    "config flag where there is none": (["doctor", "--training.steps", "1"], 2, "training.steps"),
    "unknown key to explain": (["config", "explain", "training.stps"], 2, "training.steps"),
    "colour": (["--color", "sometimes", "train", "--list"], 2, "sometimes"),
    "missing data": (["train", "--training.dataset_path", "none.jsonl"], 1, "does not exist"),
    "unknown data": (["train", "--training.dataset", "c5"], 1, "did you mean"),
    "missing tokenizer": (["train", "--model.hf_assets_path", "none"], 1, "tokenizer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_a_sentence(name: str, capsys, tmp_path: Path, monkeypatch) -> None:
    words, expected, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    try:
        code, out, err = call(*words, capsys=capsys)
    except SystemExit as stopped:
        code, (out, err) = stopped.code, capsys.readouterr()
    assert code == expected, err
    assert err.splitlines()[0].startswith(("error: ", "start ")), err
    assert said in err
    assert "Traceback" not in out + err
    assert "titan-report" not in err


def test_all_problems_of_a_file_come_at_once_with_their_lines(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[training]\nstps = 5\nseq_len = "long"\n\n[optimiser]\nlr = 1\n\n[optimizer]\nname = "Lion"\n')
    code, _, err = call("train", str(path), capsys=capsys)
    assert code == 2
    for place in (f"{path}:2", f"{path}:3", f"{path}:6", f"{path}:9"):
        assert place in err
    assert err.count("error: ") == 4


def test_syntax_errors_have_line_and_column(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[training]\nsteps = = 5\n")
    code, _, err = call("train", str(path), capsys=capsys)
    assert code == 2
    assert f"{path}:2:9" in err
    path.write_bytes(b"\xff\xfe")
    assert call("train", str(path), capsys=capsys)[0] == 2
    assert call("train", str(tmp_path), capsys=capsys)[0] == 2


def mutations(number: int) -> list[list[str]]:
    """Return command lines with one key or value broken at random, reproducibly."""
    dice = random.Random(0)
    found = []
    keys = [key for key, field in fields().items() if key != "model.args" and field.type is not str]
    while len(found) < number:
        key = dice.choice(keys)
        field = fields()[key]
        kind = dice.choice(["typo", "type", "range", "section"])
        if kind == "typo":
            at = dice.randrange(key.index(".") + 1, len(key))
            broken = key[:at] + dice.choice("qxz") + key[at:]
            found.append([f"--{broken}", "1"])
        elif kind == "section":
            found.append([f"--x{key}", "1"])
        elif kind == "type" and "list" not in str(field.type) and "str" not in str(field.type).replace("structs", ""):
            found.append([f"--{key}=some words"])
        elif (kind == "range" and "Ge" in repr(field.type)) or "ge=0" in repr(field.type) or choices(field.type):
            found.append([f"--{key}=-7"])
    return found


@pytest.mark.parametrize("words", mutations(200), ids=" ".join)
def test_mutated_configs_are_refused(words: list[str], capsys) -> None:
    code, out, err = call("train", *words, capsys=capsys)
    assert code == 2, (words, out, err)
    assert err.startswith("error: ")
    assert "-->" in err
    assert "tip: " in err
    assert "Traceback" not in err


def test_typos_of_keys_are_recognised() -> None:
    from titan_core.config.fields import suggest

    dice = random.Random(1)
    keys = list(fields())
    right = 0
    for _ in range(200):
        key = dice.choice(keys)
        at = dice.randrange(len(key) - 1)
        how = dice.randrange(4)
        broken = [
            key[:at] + key[at + 1 :],
            key[:at] + key[at + 1] + key[at] + key[at + 2 :],
            key[:at] + "x" + key[at:],
            key[:at] + "x" + key[at + 1 :],
        ][how]
        right += suggest(broken) == key
    assert right >= 180


# ------------------------------------------------------------------------------------------------ output


def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    for words, ok, schema in (
        (["train", "--list"], True, "titan.train/1"),
        (["config", "show", "llama3_8b"], True, "titan.config-show/1"),
        (["config", "list", "optimizer"], True, "titan.config-list/1"),
        (["--version"], True, "titan.titan/1"),
        (["train", "--training.stps", "1"], False, "titan.train/1"),
        (["tran"], False, "titan.titan/1"),
        (["generate", "llm", "--checkpoint", "none", "--prompt", "x"], False, "titan.generate-llm/1"),
    ):
        done = titan(*words, "--json", cwd=tmp_path)
        found = json.loads(done.stdout)
        assert found["schema"] == schema
        assert found["ok"] is ok
        assert isinstance(found["seconds"], float)
        assert done.stderr == ""
        if not ok:
            assert found["error"]["code"] == done.returncode
            assert found["error"]["message"]


def test_a_reader_that_leaves_is_no_failure(tmp_path: Path) -> None:
    words = f"{sys.executable} -m titan_cli config show llama3_8b --help-comments"
    line = f"set -o pipefail; {words} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams_change_no_exit_code() -> None:
    for words, expected in (("train nosuch 2>&-", 2), ("config show >&-", 0), ("train nosuch --json 2>&-", 2)):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m titan_cli {words}"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == expected, words
        assert done.stdout.startswith("{") == ("--json" in words)  # an error never lands on stdout otherwise


def test_words_need_not_be_those_of_the_process(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["something", "else"])
    assert run(["config", "explain", "optimizer.lr"]) == 0
    assert "Peak learning rate" in capsys.readouterr().out


def test_verbose_says_what_was_set(capsys) -> None:
    code, out, err = call("config", "diff", "llama3_8b", "llama3_8b", "-v", capsys=capsys)
    assert (code, err) == (0, "")
    code, out, err = call("config", "show", "llama3_8b", "--optimizer.lr", "1e-4", "-v", capsys=capsys)
    assert code == 0
    assert "optimizer.lr = 0.0001  # --optimizer.lr" in err
    assert "optimizer.lr" not in out


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_in_a_pipe(env: dict[str, str], tmp_path: Path) -> None:
    done = titan("train", "--training.stps", "1", cwd=tmp_path, **env)
    assert "\033" not in done.stdout + done.stderr


def test_colour_can_be_forced(tmp_path: Path) -> None:
    assert "\033[" in titan("train", "--training.stps", "1", "--color", "always", cwd=tmp_path).stderr
    assert "\033[" in titan("train", "--training.stps", "1", cwd=tmp_path, FORCE_COLOR="1").stderr


def test_unexpected_errors_leave_a_report(capsys, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("titan_cli.commands.config.as_toml", broken)
    code, _, err = call("config", "show", capsys=capsys)
    assert code == 1
    report = Path(err.split("--> ")[1].split("\n")[0])
    assert "ZeroDivisionError: surprise" in report.read_text()
    assert "command: titan config show" in report.read_text()
    assert '"dump_folder"' in report.read_text()
    assert "Traceback" not in err
    report.unlink()


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("argv", "words", "flags"),
    [
        (["train", "--a.b", "1", "x.toml"], ["train", "x.toml"], [("a.b", "1")]),
        (["train", "--optimizer.lr", "-1"], ["train"], [("optimizer.lr", "-1")]),
        (["train", "--compile.enable", "x.toml"], ["train", "x.toml"], [("compile.enable", None)]),
        (["train", "--compile.enable", "false"], ["train"], [("compile.enable", "false")]),
        (["train", "--compile.no_enable", "x"], ["train", "x"], [("compile.no_enable", None)]),
        (["train", "--compile.enable=true"], ["train"], [("compile.enable", "true")]),
        (["train", "--training.seq-len", "8"], ["train"], [("training.seq_len", "8")]),
        (["train", "--run", "out/a.b"], ["train"], [("job.dump_folder", "out/a.b")]),
        (["train", "--a.b", "--c.d", "2"], ["train"], [("a.b", None), ("c.d", "2")]),
        (["train", "--dry-run", "a.toml"], ["train", "--dry-run", "a.toml"], []),
        (["train", "--", "--a.b", "1"], ["train", "--", "--a.b", "1"], []),
    ],
)
def test_config_flags_are_taken_out(argv: list[str], words: list[str], flags: list) -> None:
    found = split(argv)
    assert (found.words, found.flags) == (words, flags)


# ------------------------------------------------------------------------------------------------ config


def test_show_says_where_values_come_from(tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "llama3_8b"\n\n[training]\nsteps = 7\n')
    code, out, _ = call("config", "show", str(path), "--why", "--optimizer.lr", "1e-4", capsys=capsys)
    assert code == 0
    lines = {line.split(" = ")[0]: line for line in out.split("[validation]")[0].splitlines() if " = " in line}
    assert lines["steps"].endswith(f"# {path}:4")
    assert lines["lr"].endswith("# --optimizer.lr")
    assert "recipe llama3_8b" in lines["flavor"]
    assert lines["beta1"].endswith("# default")


@pytest.mark.parametrize("name", recipes())
def test_shown_config_can_be_read_again(name: str, tmp_path: Path, capsys) -> None:
    _, out, _ = call("config", "show", name, "--help-comments", capsys=capsys)
    path = tmp_path / "again.toml"
    path.write_text(out)
    code, out, err = call("config", "diff", name, str(path), capsys=capsys)
    assert (code, out.strip()) == (0, "no difference"), err


@pytest.mark.parametrize("name", recipes())
def test_recipes_have_a_description_and_are_valid(name: str) -> None:
    from titan_core.config.checks import check
    from titan_core.config.load import load

    assert len(describe(recipes()[name])) > 10
    assert check(load(name)) == []


@pytest.mark.parametrize("how", ["--dry-run", "--memory_estimation.enable"])
def test_plan_of_a_recipe_is_one_object(how: str, capsys) -> None:
    words = ("train", "llama3_debugmodel", how, "--nproc", "8", "--json")  # all are planned in tests of plans
    code, out, _ = apart(lambda: call(*words, capsys=capsys))
    assert code == 0
    assert json.loads(out)["parameters"] > 1_000_000


def test_every_key_has_help() -> None:
    assert [key for key, field in fields().items() if len(field.help) < 10] == []


def test_schema_describes_every_key(capsys) -> None:
    _, out, _ = call("config", "schema", capsys=capsys)
    tree = json.loads(out)
    found = []

    def visit(name: str, prefix: str) -> None:
        for key, entry in tree["$defs"][name]["properties"].items():
            text = json.dumps(entry)
            if f"{prefix}{key}" in fields():
                assert entry["description"]
                found.append(f"{prefix}{key}")
            elif "$ref" in text:
                visit(text.split("#/$defs/")[1].split('"')[0], f"{prefix}{key}.")

    visit("Config", "")
    assert sorted(found) == sorted(fields())


def test_torchtitan_file_runs_unchanged(tmp_path: Path, capsys) -> None:
    path = tmp_path / "theirs.toml"
    path.write_text(
        '[job]\ndump_folder = "./outputs"\ndescription = "Llama 3 debug training"\nprint_config = false\n'
        '[profiling]\nenable_profiling = false\nsave_traces_folder = "profile_trace"\nprofile_freq = 10\n'
        "enable_memory_snapshot = false\n"
        '[metrics]\nlog_freq = 1\ndisable_color_printing = false\nenable_tensorboard = false\nsave_tb_folder = "tb"\n'
        '[model]\nname = "llama3"\nflavor = "debugmodel"\n'
        '[optimizer]\nname = "AdamW"\nlr = 8e-4\neps = 1e-8\n'
        '[lr_scheduler]\nwarmup_steps = 2\ndecay_ratio = 0.8\ndecay_type = "linear"\nmin_lr_factor = 0.0\n'
        '[training]\nlocal_batch_size = 8\nseq_len = 2048\nmax_norm = 1.0\nsteps = 10\ndataset = "c4_test"\n'
        "[parallelism]\ndata_parallel_replicate_degree = 1\ndata_parallel_shard_degree = -1\n"
        'fsdp_reshard_after_forward = "default"\ntensor_parallel_degree = 1\nenable_async_tensor_parallel = false\n'
        "pipeline_parallel_degree = 1\ncontext_parallel_degree = 1\n"
        '[checkpoint]\nenable = false\nfolder = "checkpoint"\ninterval = 10\nlast_save_model_only = false\n'
        'export_dtype = "float32"\nasync_mode = "disabled"\n'
        '[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "2"\n'
        '[compile]\nenable = false\ncomponents = ["model", "loss"]\n'
        "[quantize.linear.float8]\nenable_fsdp_float8_all_gather = false\n"
        'precompute_float8_dynamic_scale_for_fsdp = false\nfilter_fqns = ["output"]\n'
        '[validation]\nenable = false\ndataset = "c4_validation"\nfreq = 5\nsteps = 10\n'
    )
    code, out, err = apart(lambda: call("train", str(path), "--dry-run", capsys=capsys))
    assert code == 0, err
    assert "6,163,712 parameters" in out


# ------------------------------------------------------------------------------------------------ completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_those_checked_in(shell: str) -> None:
    from titan_cli.complete import SCRIPTS

    path = Path(__file__).parents[2] / "completions" / f"titan.{shell}"
    assert path.read_text() == SCRIPTS[shell]


def test_completions_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    code, out, _ = call("completions", "install", "--shell", "fish", capsys=capsys)
    assert code == 0
    path = tmp_path / ".config/fish/completions/titan.fish"
    assert str(path) in out
    assert "__titan_complete" in path.read_text()
    assert call("completions", "install", "--shell", "tcsh", capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["config", "sh"], ["show"]),
        (["train", "llama3_d"], ["llama3_debugmodel"]),
        (["train", "--optimizer.lr"], ["--optimizer.lr"]),
        (["train", "llama3_8b", "--training.seq"], ["--training.seq_len"]),
        (["train", "--checkpoint.async_mode", "async_"], ["async_with_pinned_mem"]),
        (["train", "--compile.enable", ""], ["true", "false"]),
        (["train", "--dry"], ["--dry-run"]),
        (["validate", "checkpoint", "--wor"], ["--world"]),
        (["config", "explain", "guard.non"], ["guard.non_finite"]),
        (["doctor", "--optimizer.l"], []),
        (["train", "--optimizer.name=Ad"], ["--optimizer.name=AdamW", "--optimizer.name=Adam"]),
        (["train", "--optimizer.name", "=", "AdamW"], ["AdamW"]),
        (["train", "--compile.enable", "="], ["true", "false"]),
        (["train", "--run", "o"], []),
        (["train", "--job.dump_folder", "l"], []),
        (["train", "--resume", ""], ["auto", "never"]),
        (["train", "--dry-run", "llama3_8"], ["llama3_8b"]),
        (["train", "--allow-change", "optimizer.l"], ["optimizer.lr"]),
        (["train", "--color", "al"], ["always"]),
        (["train", "--json", "llama3_8"], ["llama3_8b"]),
        (["doctor", "--ver"], ["--verbose"]),
        (["completions", "show", "z"], ["zsh"]),
        (["completions", "install", "--shell", "f"], ["fish"]),
        (["config", "list", "guard.spike_w"], ["guard.spike_window"]),
        (["config", "diff", "llama3_8b", "llama3_1"], ["llama3_1b"]),
        (["bench", "moe-g"], ["moe-gemm"]),
        (["bench-kernels", "coll"], ["collectives"]),
        (["generate", "llm", "--checkpoint", "o"], []),
        (["nosuch", ""], []),
    ],
)
def test_completion(words: list[str], expected: list[str], monkeypatch) -> None:
    import typer

    from titan_cli.complete import candidates
    from titan_cli.main import app

    monkeypatch.setattr(sys, "argv", ["titan", *words])
    found = candidates(words[:-1], words[-1], typer.main.get_command(app))
    assert [value for value, _ in found] == expected


def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    (tmp_path / "titan").write_text(f'#!/bin/sh\nexec {sys.executable} -m titan_cli "$@"\n')
    (tmp_path / "titan").chmod(0o755)
    script = Path(__file__).parents[2] / "completions" / "titan.bash"
    line = f"source {script}; COMP_WORDS=(titan train --optimizer.lr); COMP_CWORD=2; _titan_completion; "
    line += 'echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.strip() == "--optimizer.lr"


def test_ctrl_c_is_answered(capsys, monkeypatch) -> None:
    from titan_core.jobs import doctor

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert call("doctor", capsys=capsys) == (130, "", "error: interrupted\n")
