"""The local launcher, with small scripts in place of training, and once with training itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_cli.launch import Ranks, count_gpus
from titan_core.runtime.errors import UsageError

WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from titan_cli import worker
from titan_core.runtime.errors import TitanError
rank = int(os.environ["RANK"])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
{body}
"""

PARENT = """
import sys
sys.path.insert(0, {root!r})
from titan_cli import launch
from titan_cli.output import Output
launch.CRASH_GRACE = 1.0
argv = [sys.executable, sys.argv[1]]
output = Output(mode=sys.argv[4])
sys.exit(launch.spawn(launch.Ranks(int(sys.argv[2])), float(sys.argv[3]), output, [], argv))
"""

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def start(tmp_path: Path):
    """Return a function that starts a job of `size` workers that run `body`."""
    started: list[subprocess.Popen] = []

    def begin(body: str, size: int = 2, grace: float = 20, json_mode: bool = False) -> subprocess.Popen[str]:
        (tmp_path / "worker.py").write_text(WORKER.format(root=ROOT, body=body))
        (tmp_path / "parent.py").write_text(PARENT.format(root=ROOT))
        words = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "worker.py"), str(size), str(grace)]
        words.append("json" if json_mode else "human")
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_every_rank_knows_its_place(start) -> None:
    body = "print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], os.environ['OMP_NUM_THREADS'])"
    code, out, err = end(start(body, 3))
    assert (code, out.split(), err) == (0, ["0", "3", "0", out.split()[3]], "")


def test_warnings_of_other_ranks_come_once(start) -> None:
    code, _, err = end(start("worker.tell_parent(warning='careful') if rank else None", 3))
    assert code == 0
    assert err.count("careful") == 1
    assert "rank " in err


def test_the_first_error_is_shown_once(start) -> None:
    body = (
        "time.sleep(0.2 * rank); worker.report_error(TitanError('it broke', where='here', tip='mend it')); sys.exit(1)"
    )
    code, _, err = end(start(body, 3))
    assert code == 1
    assert err.count("it broke") == 1
    assert "rank 0: it broke" in err
    assert "--> here" in err
    assert "2 other ranks failed the same way" in err


def test_a_config_error_keeps_its_exit_code(start) -> None:
    body = (
        "from titan_core.runtime.errors import ConfigError, Problem\n"
        "e = ConfigError([Problem('a.b', 'wrong', 'x.toml:3', 'do this'), Problem('c.d', 'wrong too')])\n"
        "worker.report_error(e); sys.exit(2)"
    )
    code, _, err = end(start(body))
    assert code == 2
    assert err.count("error: ") == 2
    assert "x.toml:3" in err


def test_a_dead_rank_ends_the_others(start) -> None:
    began = time.monotonic()
    code, _, err = end(start("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)"))
    assert code == 1
    assert "rank 1: was killed by SIGKILL" in err
    assert time.monotonic() - began < 30


def test_the_last_words_of_a_dead_rank_are_shown(start) -> None:
    code, _, err = end(start("if rank: print('terminate called', file=sys.stderr); os._exit(3)"))
    assert code == 1
    assert "rank 1: left with exit code 3: terminate called" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank_once(number: signal.Signals, start, tmp_path: Path) -> None:
    body = (
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\n"
        "while not stopped: time.sleep(0.02)\n"
        "time.sleep(0.3)\n"
        f"open({str(tmp_path)!r} + f'/seen{{rank}}', 'w').write(str(len(stopped)))\n"
        "sys.exit(75)"
    )
    process = start(body)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code, _, err = end(process)
    assert (code, err) == (75, "")
    assert [path.read_text() for path in sorted(tmp_path.glob("seen*"))] == ["1", "1"]


def test_a_rank_that_does_not_stop_is_killed_after_the_grace(start, tmp_path: Path) -> None:
    body = (
        "import threading; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\n"
        "time.sleep(60)"
    )
    process = start(body, grace=0.5)
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    code, _, err = end(process)
    assert code == 1
    assert "SIGKILL" in err
    assert time.monotonic() - began < 20


def test_a_rank_that_fails_in_good_order_ends_those_that_wait_for_it(start) -> None:
    body = (
        "if rank: worker.report_error(TitanError('bad shard')); worker.tell_parent(done=1); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)"
    )
    began = time.monotonic()
    code, _, err = end(start(body))
    assert code == 1
    assert "rank 1: bad shard" in err
    assert "rank 0" not in err  # it was ended by us
    assert time.monotonic() - began < 30


def test_the_cause_is_shown_and_not_what_it_caused(start) -> None:
    body = (
        "if rank: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(0.4)\n"  # as if it had seen it at once: before the parent sees the death
        "worker.report_error(TitanError('Connection closed by peer [127.0.0.1]'))\n"
        "worker.tell_parent(done=1); sys.exit(1)"
    )
    code, _, err = end(start(body))
    assert code == 1
    assert err.splitlines()[0] == "error: rank 1: was killed by SIGKILL"


def test_a_failure_while_stopping_does_not_use_up_the_grace(start, tmp_path: Path) -> None:
    body = (
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\n"
        "while not stopped: time.sleep(0.02)\n"
        "if rank: sys.exit(1)\n"
        "time.sleep(60)"
    )
    process = start(body, grace=300)
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    code, _, err = end(process)
    assert code == 1
    assert "rank 1: left with exit code 1" in err
    assert time.monotonic() - began < 30


def test_ranks_stop_when_their_parent_is_killed(start, tmp_path: Path) -> None:
    body = (
        "worker.stop_when_orphaned()\n"
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').write(str(os.getpid()))\n"
        "while not stopped: time.sleep(0.02)\n"
        f"open({str(tmp_path)!r} + f'/saved{{rank}}', 'w').close()"
    )
    process = start(body)
    while sum(path.stat().st_size > 0 for path in tmp_path.glob("ready*")) < 2:
        time.sleep(0.02)
    process.kill()
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("saved*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_the_result_of_the_first_rank_is_the_only_json(start, tmp_path: Path) -> None:
    body = "if not rank: worker.tell_parent(result={'step': 7})\nworker.tell_parent(done=0)"
    code, out, err = end(start(body, json_mode=True))
    assert (code, err) == (0, "")
    assert json.loads(out)["step"] == 7
    body = (
        "if rank: time.sleep(0.3); worker.report_error(TitanError('late')); sys.exit(1)\n"
        "worker.tell_parent(result={'step': 7}, done=0)"
    )
    code, out, _ = end(start(body, json_mode=True))
    assert code == 1
    assert json.loads(out)["error"]["message"] == "rank 1: late"


def test_a_traceback_comes_from_the_rank_that_failed(start) -> None:
    body = "if rank: worker.report_error(TitanError('it broke'), 'Traceback (most recent call last): ...'); sys.exit(1)"
    code, _, err = end(start(body))
    assert code == 1
    assert err.count("Traceback") == 1
    assert "traceback of rank 1" in err


def test_a_long_message_arrives_whole(start) -> None:
    code, _, err = end(start("worker.tell_parent(warning='x' * 300_000) if rank else None"))
    assert code == 0
    assert err.count("x") == 300_000


def test_an_abort_after_success_is_no_failure(start) -> None:
    code, _, err = end(start("worker.tell_parent(done=0); os.abort()"))
    assert (code, err) == (0, "")


def test_options_are_checked(monkeypatch) -> None:
    for options in (("x",), ("0",), ("2", 2), ("2", 2, 2, "host:1")):
        with pytest.raises(UsageError):
            Ranks.of(*options)
    assert Ranks.of("3", 2, 1, "host:1").world_size == 6
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    joined = Ranks.of("1")
    assert (joined.world_size, joined.must_spawn, joined.note) == (4, False, None)
    assert "`--nproc 8` is ignored" in str(Ranks.of("8").note)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5")
    assert count_gpus() == 3


TINY = [
    "--model.args.dim", "32", "--model.args.n_layers", "2", "--model.args.n_heads", "4", "--model.args.n_kv_heads", "2",
    "--model.args.ffn_dim", "48", "--training.seq_len", "32", "--training.local_batch_size", "2",
    "--metrics.log_freq", "1", "--training.global_batch_size", "8", "--validation.no_enable",
]  # fmt: skip


def train(*words: str, cwd: Path) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": ROOT}
    return subprocess.Popen(
        [sys.executable, "-m", "titan_cli", "train", *TINY, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
    )


@pytest.mark.slow
def test_two_ranks_train_stop_and_go_on(tmp_path: Path) -> None:
    process = train("--nproc", "2", "--training.steps", "100000", cwd=tmp_path)
    metrics = tmp_path / "outputs" / "llama3_debugmodel" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 5' in metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert code == 75, err
    assert "stopped by SIGINT" in err
    assert "Traceback" not in err
    assert "titan generate llm" in err
    last = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    code, out, err = end(train("--training.steps", "100000", "--until", str(last + 2), "--json", cwd=tmp_path))
    assert code == 0, err
    found = json.loads(out)
    assert found["step"] == last + 2
    assert found["first_loss"] is not None


@pytest.mark.slow
def test_torchrun_is_joined(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titan_cli"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": ROOT}
    done = subprocess.run(
        [*words, "train", *TINY, "--training.steps", "3", "--job.dump_folder", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 3/3  loss") == done.stderr.count("loading torch") == 1
    assert (tmp_path / "run" / "checkpoint" / "step-3" / "ranks" / "1.json").exists()


@pytest.mark.slow
def test_an_error_on_every_rank_is_shown_once(tmp_path: Path) -> None:
    code, _, err = end(train("--nproc", "2", "--training.dataset", "nosuch", cwd=tmp_path))
    assert code == 1
    assert err.count("no data set `nosuch`") == 1
    assert "1 other rank failed the same way" in err
