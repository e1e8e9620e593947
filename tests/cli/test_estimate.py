"""`titan estimate-flops`, as a user meets it."""

import json

import pytest

from tests.cli.test_cli import call
from titan_core.config.load import load
from titan_core.estimation.devices import USABLE, device
from titan_core.jobs import estimate, precheck


def test_text_says_both_conventions_memory_and_time(capsys) -> None:
    words = ["estimate-flops", "llama3_8b", "--gpus", "8", "--gpu", "h100", "--tokens", "1T", "--mfu", "0.45"]
    code, out, err = call(*words, capsys=capsys)
    assert code == 0, err
    assert "8.03 B" in out
    assert "5.791e+10 a token: products 4.503e+10, full attention 1.288e+10" in out
    assert "5.147e+10 with the keys that a token of 8,192 sees" in out
    assert "1 T tokens = 5.79e+22 FLOP" in out
    assert "8 x h100 at 45% of 989.4 TFLOP/s: 61.5 k tokens/s, 188 days" in out
    assert "GiB a rank; 8 ranks: fsdp 8" in out
    assert "if computing reaches 60%" in out
    assert max(map(len, out.splitlines())) <= 120


def test_what_fits_fits_and_can_be_asked_for(capsys) -> None:
    words = ["estimate-flops", "qwen3_30b_a3b", "--gpus", "16", "--gpu", "h100", "--fit", "--json"]
    code, out, err = call(*words, capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    fits = found["fits"]
    assert 5 < len(fits) <= 10
    speeds = [fit["tokens_per_second"] for fit in fits]
    assert speeds == sorted(speeds, reverse=True)
    room = USABLE * device("h100").memory
    for fit in fits:
        parts = {name: size for name, size in fit["memory"].items() if name != "host"}
        assert sum(parts.values()) <= room
    for fit in fits[:3]:
        settings = [(key, str(value)) for key, value in fit["settings"].items()]
        assert precheck.run(load("qwen3_30b_a3b", settings), 16) == []
        again = estimate.run(load("qwen3_30b_a3b", settings), 16, device("h100"), 0.4)
        assert (again.layout, again.tokens_per_step) == (fit["layout"], fit["tokens_per_step"])
        assert again.modelled is not None
        assert again.modelled.tokens_per_second == fit["tokens_per_second"]
        assert sum(again.memory.parts().values()) == sum(fit["memory"].values()) - fit["memory"]["host"]


def test_what_fits_stands_for_a_layout_that_does_not(capsys) -> None:
    words = ["llama3_8b", "--gpus", "6", "--gpu", "h200", "--parallelism.tensor_parallel_degree", "4"]
    code, _, err = call("estimate-flops", *words, capsys=capsys)
    assert code == 2
    assert "6 ranks do not divide" in err
    code, out, err = call("estimate-flops", *words, "--fit", "--json", capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    assert found["layout"] == found["fits"][0]["layout"]
    assert found["fits"][0]["settings"]["parallelism.tensor_parallel_degree"] != 4


def test_a_batch_that_is_asked_for_is_kept() -> None:
    resolved = load("llama3_8b", [("training.global_batch_size", "64")])
    fits = estimate.fit(resolved, 16, device("h200"))
    assert {fit.tokens_per_step for fit in fits} == {64 * 8192}


@pytest.mark.parametrize(
    ("words", "said", "advised"),
    [
        (["llama3_8b", "--gpu", "h10"], "no device `h10`", "did you mean `h100`?"),
        (["llama3_8b", "--fit"], "`--fit` needs to know", "--gpu a100"),
        (["llama3_8b", "--fit", "--gpu", "rtx4090"], "nothing fits 22 of rtx4090's 24 GiB on 1 rank:", "more ranks"),
        (["llama3_8b", "--tokens", "1X"], "`--tokens` cannot be `1X`", "1.5B or 15T"),
        (
            ["llama3_8b", "--gpus", "3", "--parallelism.tensor_parallel_degree", "2"],
            "3 ranks do not divide",
            "`fsdp 3`",
        ),
    ],
)
def test_mistakes_are_answered(words: list[str], said: str, advised: str, capsys) -> None:
    code, _, err = call("estimate-flops", *words, capsys=capsys)
    assert code == 2
    assert said in err
    assert advised in err
