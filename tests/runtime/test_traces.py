"""Traces of made-up hangs, and what is made of them; the real ones are in tests/training/test_hang.py."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cli.test_cli import call
from tests.ranks import run_ranks
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.hang_report import explain, ranks_text
from titan_core.runtime.traces import find_folder, load_trace, read_folder

WORLD, OTHER = ("0", "default_pg"), ("1", "mesh_tp")


class Folder:
    """Writes the files of ranks, their calls in order of time."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.time = path, size, 0
        path.mkdir(exist_ok=True)

    def rank(self, rank: int, *calls: dict[str, Any], as_json: bool = False, **notes: Any) -> None:
        numbers: dict[Any, int] = {}
        entries = []
        for one in calls:
            key = one["process_group"]
            numbers[key] = one.pop("number", numbers.get(key, 0) + 1)
            self.time += 1
            entries.append({"collective_seq_id": numbers[key], "time_created_ns": self.time, **one})
        trace = {"version": "2.10", "entries": entries, "pg_config": {"": {"name": "", "desc": "", "ranks": "[]"}}}
        data = json.dumps(trace).encode() if as_json else pickle.dumps(trace, protocol=2)
        (self.path / f"rank_{rank}").write_bytes(data)
        groups = {"0": list(range(self.size)), "1": [0, 1]}
        known = {"rank": rank, "world_size": self.size, "state": "failed", "error": None, "stack": [], "groups": groups}
        (self.path / f"rank_{rank}.json").write_text(json.dumps({**known, **notes}))


def enters(op: str = "all_reduce", group: Any = WORLD, size: int = 4, line: int = 10, **changes: Any) -> dict[str, Any]:
    frames = [{"name": op, "filename": "/x/site-packages/torch/distributed/d.py", "line": 1}]
    return {
        "frames": [*frames, {"name": "step", "filename": "/home/me/my/run.py", "line": line}],
        "process_group": group,
        "profiling_name": f"gloo:{op}",
        "p2p_seq_id": 0,
        "input_dtypes": ["Float"],
        "input_sizes": [[size]],
        "output_sizes": [[size]],
        "state": "scheduled",
        "retired": True,
        "is_p2p": False,
        "thread_id": "7",
        **changes,
    }


def summary(folder: Path) -> str:
    return explain(read_folder(folder)).summary


@pytest.mark.parametrize("as_json", [False, True])
def test_a_rank_that_is_behind(as_json: bool, tmp_path: Path) -> None:
    folder = Folder(tmp_path, 3)
    for rank in (0, 2):
        folder.rank(rank, enters(), enters("broadcast"), enters(), as_json=as_json)
    folder.rank(1, enters(), enters("broadcast"), state="asked", stack=["nap (a.py:3): sleep(9)"], as_json=as_json)
    report = explain(read_folder(tmp_path))
    assert report.summary == (
        "rank 1 is missing in all_reduce #3 of group `default_pg` (float32 [4]), where ranks 0, 2 wait: "
        "rank 1 is in no collective but in nap (a.py:3): sleep(9); its last collective was "
        "broadcast #2 of group `default_pg`, called by step (my/run.py:10)"
    )
    assert report.parting is not None
    assert (report.parting.waiting, report.parting.missing, report.parting.differ) == ((0, 2), (1,), False)
    assert "  called by step (my/run.py:10)" in report.text


def test_who_waits_for_the_one_that_waits_for_another_is_not_the_cause(tmp_path: Path) -> None:
    """Rank 2 waits for rank 1 in the world's group; rank 1 waits for rank 0 in another; rank 0 sleeps."""
    folder = Folder(tmp_path, 3)
    folder.rank(2, enters(), enters())
    folder.rank(1, enters(), enters(group=OTHER))
    folder.rank(0, enters(), state="asked", stack=["nap (a.py:3): sleep(9)"])
    report = explain(read_folder(tmp_path))
    assert "rank 0 is missing in all_reduce #1 of group `mesh_tp`" in report.summary
    assert report.others[0].call.group == "0"


def test_in_a_circle_the_unusual_step_is_the_wrong_one(tmp_path: Path) -> None:
    """Rank 1 left out the world's reduction, which came before the other group's in every step until then."""
    step = [enters, lambda: enters("all_gather", OTHER, line=20), lambda: enters("broadcast", line=30)]
    for left_out in (0, 1):
        folder = Folder(tmp_path / str(left_out), 2)
        for rank in range(2):
            before = [call() for _ in range(3) for call in step]
            folder.rank(rank, *before, step[1]() if rank == left_out else step[0]())
        report = explain(read_folder(folder.path))
        assert f"rank {left_out} is missing in all_reduce #7 of group `default_pg`" in report.summary
        assert f"rank {left_out} waits in all_gather #4 of group `mesh_tp`" in report.summary


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (enters(size=5), "(float32 [5])"),
        (enters(input_dtypes=["BFloat16"]), "(bfloat16 [4])"),
        (enters("broadcast"), "broadcast #2"),
    ],
)
def test_calls_that_do_not_match(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path, 3)
    for rank in (0, 1):
        folder.rank(rank, enters(), enters())
    folder.rank(2, enters(), other)
    said = summary(tmp_path)
    assert said.startswith("the ranks do not match in all_reduce #2 of group `default_pg` (float32 [4]): ranks 0, 1 ")
    assert words in said.partition("but rank 2 is in")[2]


def test_sizes_may_differ_in_an_all_to_all(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    folder.rank(0, enters("all_to_all", size=3), enters())
    folder.rank(1, enters("all_to_all", size=5), state="asked")
    assert "rank 1 is missing in all_reduce #2" in summary(tmp_path)


def test_a_dead_rank(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 4)
    for rank in (0, 1, 2):
        folder.rank(rank, enters(), enters(group=OTHER) if rank < 2 else enters(), enters(retired=False))
    (tmp_path / "rank_2").unlink()
    (tmp_path / "rank_2.json").unlink()
    said = summary(tmp_path)
    assert said.startswith("ranks 2, 3 are missing in all_reduce #2 of group `default_pg`")
    assert "rank 3 left no trace: it died" in said


def test_what_has_left_the_buffers_is_not_missed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    folder.rank(0, *(enters(number=number) for number in range(5, 10)))
    folder.rank(1, *(enters(number=number) for number in range(3, 9)), state="asked")
    assert "rank 1 is missing in all_reduce #9" in summary(tmp_path)


def test_a_group_that_a_full_buffer_forgot_says_nothing(tmp_path: Path) -> None:
    """Rank 1 was in the other group long ago; of rank 0 the call is just still there."""
    folder = Folder(tmp_path, 2)
    folder.rank(0, enters(group=OTHER, number=3, record_id=7), enters(number=50), enters(number=51))
    folder.rank(1, enters(number=50, record_id=9), state="asked")
    report = explain(read_folder(tmp_path))
    assert "rank 1 is missing in all_reduce #51 of group `default_pg`" in report.summary
    assert report.others == []


def test_long_traces_are_read_from_their_end(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    folder.rank(0, enters(group=OTHER), *(enters() for _ in range(3000)))
    folder.rank(1, enters(group=OTHER), *(enters() for _ in range(2999)), state="asked")
    ranks = read_folder(tmp_path)
    assert "rank 1 is missing in all_reduce #3000 of group `default_pg`" in explain(ranks).summary
    assert [len(trace.calls) for trace in ranks.values()] == [1001, 1001]


def test_equal_calls_of_different_lines_are_told(tmp_path: Path) -> None:
    """Rank 1 left out the call in line 11; what follows matches it in kind, and goes wrong only later."""
    folder = Folder(tmp_path, 2)
    folder.rank(0, enters(line=10), enters(line=11), enters(line=12), enters("broadcast", line=13))
    folder.rank(1, enters(line=10), enters(line=12), enters("broadcast", line=13))
    report = explain(read_folder(tmp_path))
    assert "do not match in all_reduce #3" in report.summary
    assert "#2 of this group matched, but" in report.text
    assert "rank 0 by step (my/run.py:11); rank 1 by step (my/run.py:12)" in report.text


def test_all_met(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    for rank in range(2):
        folder.rank(rank, enters(), state="left", error="the disk is full")
    assert summary(tmp_path) == "every rank met the others in every collective; rank 0: the disk is full"


def test_a_recorder_that_is_off(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    folder.rank(0)
    assert "trace_buf_size" in explain(read_folder(tmp_path)).tip


def test_only_the_device_of_a_gpu_rank_wrote(tmp_path: Path) -> None:
    """NCCL's own dump: no notes, but its groups; the host's trace lies beside it, in JSON."""
    for rank in range(2):
        nccl = enters(profiling_name="nccl:_all_gather_base", state="started", retired=False, collective_seq_id=3)
        entries = [{**nccl, "time_created_ns": 5}] if rank == 0 else []
        config = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}
        trace = {"version": "2.10", "entries": entries, "pg_config": config}
        (tmp_path / f"nccl_{rank}").write_bytes(pickle.dumps(trace, protocol=2))
        host = {"entries": [{**enters(), "time_created_ns": 1, "collective_seq_id": 1}]}
        (tmp_path / f"nccl_{rank}.host").write_text(json.dumps(host))
    report = explain(read_folder(tmp_path))
    assert "rank 1 is missing in _all_gather_base #3 of group `default_pg`" in report.summary
    assert report.parting is not None
    assert report.parting.key == ("nccl", "0")


def test_a_trace_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        load_trace(pickle.dumps({"entries": [Evil()]}, protocol=2))
    (tmp_path / "rank_0").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunFailed, match="no trace of a rank"):
        read_folder(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"hello", pickle.dumps([1]), b'{"entries": [{}]}', pickle.dumps({})[:-2]])
def test_what_is_no_trace_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rank_0").write_bytes(data)
    with pytest.raises(RunFailed, match="no trace of a rank") as caught:
        read_folder(tmp_path)
    assert caught.value.where == str(tmp_path / "rank_0")


def _dump_both() -> tuple[bytes, bytes]:
    dist.all_reduce(torch.ones(2, 3))
    c10d: Any = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
    return c10d._dump_fr_trace(), c10d._dump_fr_trace_json()


def test_both_formats_of_torch_say_the_same() -> None:
    for plain, text in run_ranks(_dump_both, 2):
        a, b = load_trace(plain)["entries"][-1], load_trace(text)["entries"][-1]
        names = ("profiling_name", "collective_seq_id", "input_sizes", "input_dtypes", "output_sizes")
        assert [a[name] for name in names] == [b[name] for name in names]
        assert (a["profiling_name"], a["input_sizes"]) == ("gloo:all_reduce", [[2, 3]])
        assert any(frame["name"] == "_dump_both" for frame in a["frames"])


def test_a_prefix_may_end_in_a_digit(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    for rank in range(2):
        folder.rank(rank, enters())
        for end in ("", ".json"):
            (tmp_path / f"rank_{rank}{end}").rename(tmp_path / f"run1{rank}{end}")
    assert sorted(read_folder(tmp_path, "run1")) == [0, 1]
    assert sorted(read_folder(tmp_path)) == [10, 11]  # without knowing the prefix


def test_ranks_in_words() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([2, 0, 1, 5]) == "ranks 0-2, 5"
    assert ranks_text([4, 5]) == "ranks 4, 5"


def test_the_command_reads_traces_of_a_run(tmp_path: Path, capsys) -> None:
    folder = Folder(tmp_path / "comm_traces", 2)
    folder.rank(0, enters(), enters())
    folder.rank(1, enters(), state="asked", stack=["nap (a.py:3): sleep(9)"])
    (tmp_path / "metrics.jsonl").touch()
    (folder.path / "report.txt").write_text("as it was written by the run")
    assert find_folder(tmp_path) == folder.path
    code, out, _ = call("doctor", "--traces", str(tmp_path), capsys=capsys)
    assert code == 0
    assert out.startswith("rank 1 is missing in all_reduce #2 of group `default_pg`")
    code, out, _ = call("doctor", "--traces", str(folder.path), "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0
    assert found["collective"] == {
        "op": "all_reduce",
        "number": 2,
        "group": "0",
        "description": "default_pg",
        "backend": "gloo",
        "dtypes": ["float32"],
        "sizes": [[4]],
        "called_by": ["step (my/run.py:10)"],
        "members": [0, 1],
        "waiting": [0],
        "missing": [1],
        "differ": False,
    }
    assert found["ranks"][1]["whereabouts"].startswith("is in no collective but in nap (a.py:3)")


@pytest.mark.parametrize("name", ["", "nosuch"])
def test_the_command_without_traces(name: str, tmp_path: Path, capsys) -> None:
    code, _, err = call("doctor", "--traces", str(tmp_path / name), capsys=capsys)
    assert code == 1
    assert str(tmp_path / name) in err
    assert "Traceback" not in err
