"""Hangs made on purpose under `titan train --nproc 2` and under torchrun: what a user sees, and how long it takes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_launch import ROOT, TINY, end, train

TIMEOUT = 3
FAULT = """
import os, signal, time
from titan_core.training import step
original, calls = step._all_reduce, []

def reduce(value, parts):
    calls.append(1)
    if parts.world.rank == 1 and len(calls) == 3:
        open({times!r}, "w").write(str(time.time()))
        {fault}
    return original(value, parts)

step._all_reduce = reduce
"""
SLEEP, DIE = "time.sleep(1000)", "os.kill(os.getpid(), signal.SIGKILL)"
WORDS = [
    "--training.steps", "50", "--job.dump_folder", "run", "--checkpoint.no_enable",
    "--experimental.custom_import", "fault", "--comm.init_timeout_seconds", "60",
    "--comm.train_timeout_seconds", str(TIMEOUT),
]  # fmt: skip


def prepare(folder: Path, fault: str) -> None:
    (folder / "fault.py").write_text(FAULT.format(times=str(folder / "time"), fault=fault))


def since_fault(folder: Path) -> float:
    return time.time() - float((folder / "time").read_text())


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_woken(tmp_path: Path) -> None:
    prepare(tmp_path, SLEEP)
    code, out, _ = end(train("--nproc", "2", "--json", *WORDS, cwd=tmp_path))
    assert since_fault(tmp_path) < TIMEOUT + 12
    assert code == 1
    error = json.loads(out)["error"]
    assert error["kind"] == "CollectiveFailed"
    assert error["where"] == "run/comm_traces/report.txt"
    found = re.fullmatch(
        r"rank 1 is missing in all_reduce #\d+ of group `default_pg` \(float32 \[1\]\), where rank 0 waits: "
        r"rank 1 is in no collective but in reduce \(.*fault\.py:\d+\): time\.sleep\(1000\); its last .*",
        error["message"],
    )
    assert found is not None, error["message"]
    again = [sys.executable, "-m", "titan_cli", "doctor", "--traces", "run"]
    done = subprocess.run(again, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.stdout == (tmp_path / "run" / "comm_traces" / "report.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    prepare(tmp_path, DIE)
    code, _, err = end(train("--nproc", "2", *WORDS, cwd=tmp_path))
    assert since_fault(tmp_path) < 12
    assert code == 1
    assert "error: rank 1: was killed by SIGKILL; rank 1 is missing in all_reduce #" in err
    assert "where rank 0 waits: rank 1 left no trace: it died" in err
    assert "--> run/comm_traces/report.txt" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_needs_no_help(tmp_path: Path) -> None:
    prepare(tmp_path, SLEEP)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titan_cli"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": ROOT}
    command = [*words, "train", *TINY, *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert since_fault(tmp_path) < TIMEOUT + 15
    assert done.returncode == 1
    assert "error: rank 1 is missing in all_reduce #" in done.stderr
    assert "time.sleep(1000)" in (tmp_path / "run" / "comm_traces" / "report.txt").read_text()
