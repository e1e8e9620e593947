"""`titan bench` of kernels and collectives, as a user meets it on a machine without a GPU."""

import json

import pytest
import torch

from tests.cli.test_cli import call, titan

SMALL = ["--shapes", "40,32,64,3", "--seed", "7"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the shapes are not reduced")
def test_table_says_what_was_measured_and_what_was_not(capsys) -> None:
    code, out, err = call("bench", "moe-gemm", *SMALL, "--pass", "fwd,dw", "--imbalance", "0.5", capsys=capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert "seed 7" in lines[0]
    assert "bf16 matmul" in lines[1]
    assert "copy" in lines[1]
    assert lines[2].startswith("no GPU: shapes are reduced")
    rows = [line for line in lines if line.startswith("40x32x64 G=3 skew=0.5")]
    assert [line.split()[3:5] for line in rows] == [["fwd", "titan"], ["dw", "titan"]]
    assert sum("1.00x" in line for line in lines) >= 2
    assert any(line.startswith("absent: deepgemm") for line in lines)
    assert max(map(len, lines)) <= 120


def test_json_is_one_object(capsys) -> None:
    words = ["bench-kernels", "moe-gemm", *SMALL, "--pass", "dx", "--backend", "loop,titan", "--json"]
    code, out, _ = call(*words, capsys=capsys)
    found = json.loads(out)
    assert code == 0
    assert found["schema"] == "titan.bench-kernels-moe-gemm/1"
    assert found["ok"]
    assert found["seed"] == 7
    assert [(row["backend"], row["verdict"]) for row in found["rows"]] == [("titan", "right"), ("loop", "right")]
    assert found["rows"][1]["against_titan"] == pytest.approx(found["rows"][1]["seconds"] / found["rows"][0]["seconds"])
    assert found["roofline"]["copy"] > 1e6


def test_a_wrong_kernel_ends_with_code_1(capsys, monkeypatch) -> None:
    from titan_kernels import grouped_gemm

    monkeypatch.setattr(grouped_gemm, "grouped_linear", lambda x, w, ends: 1.1 * x @ w[0].T)
    code, out, _ = call("bench", "moe-gemm", *SMALL, "--pass", "fwd", capsys=capsys)
    assert code == 1
    assert "wrong: not timed, error" in out
    code, out, _ = call("bench", "moe-gemm", *SMALL, "--pass", "fwd", "--json", capsys=capsys)
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_times_are_saved_and_compared(tmp_path, capsys) -> None:
    words = ["bench", "moe-gemm", *SMALL, "--pass", "fwd", "--backend", "titan,loop"]
    saved = tmp_path / "rows.jsonl"
    code, _, err = call(*words, "--save", str(saved), capsys=capsys)
    assert code == 0, err
    head, *rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["backend"] for row in rows] == ["titan", "loop"]

    rows[0]["seconds"] /= 1e6  # titan was a million times as fast
    saved.write_text("\n".join(json.dumps(line) for line in (head, *rows)) + "\n")
    code, out, err = call(*words, "--compare", str(saved), capsys=capsys)
    assert code == 0, err
    assert "vs saved" in out
    code, out, _ = call(*words, "--compare", str(saved), "--fail-over", "50", "--json", capsys=capsys)
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    assert [row["backend"] for row in found["slower"]] == ["titan"]
    assert found["slower"][0]["against_saved"] == pytest.approx(found["rows"][0]["seconds"] / rows[0]["seconds"])

    saved.write_text(json.dumps({**head, "device": "another"}) + "\n")
    code, _, err = call(*words, "--compare", str(saved), capsys=capsys)
    assert code == 2
    assert "times of another, and this is" in err
    saved.write_text("not JSON\n")
    code, _, err = call(*words, "--compare", str(saved), capsys=capsys)
    assert code == 2
    assert f"{saved}:1" in err
    for wrong in (["--compare", str(tmp_path / "missing")], ["--fail-over", "5"]):
        assert call(*words, *wrong, capsys=capsys)[0] == 2


def test_collectives_between_two_processes() -> None:
    done = titan("bench", "collectives", "--nproc", "2", "--device", "cpu", "--largest", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["backend"]) == (2, "gloo")
    assert {row["size"] for row in found["rows"]} == {1 << 16, 1 << 18, 1 << 20}
    assert all(row["bus_gigabytes_per_second"] > 0 for row in found["rows"])
