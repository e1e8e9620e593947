"""What a person sees of a run."""

import dataclasses
import io
import os
import signal
import sys
import time

import pytest

from titan_cli.display import Display, duration, progress_line, size, sparkline, step_line
from titan_cli.notice import SignalNotice
from titan_cli.output import Output
from titan_core.runtime.events import Note, Planned, Progress, Saved, StepDone, Text, Validated, Warned


def step(number: int, loss: float = 4.0, mfu: float | None = None) -> StepDone:
    return StepDone(number, 100, loss, loss, 1.25, 3e-4, 2048 * number, 0.5, 4096.0, 0.157, mfu, 1.5, None, 0.01, 61.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(events: list, monkeypatch, *, terminal: bool = False, **output) -> str:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Display(Output(**output)) as display:
        for event in events:
            display(event)
    return stream.getvalue()


def test_a_pipe_gets_one_line_an_event(monkeypatch) -> None:
    events = [
        Planned([("run", "out"), ("model", "llama3")]),
        Note("hello"),
        step(5),
        Progress("step", 6, 100, "steps"),
        Validated(25, 5.1234, 16384, 1.0),
        Saved(50, "out/checkpoint/step-50", 74_400_000, 0.2, 0.2),
        Warned("careful", rank=3),
    ]
    lines = shown(events, monkeypatch).splitlines()
    assert lines == [
        "run       out",
        "model     llama3",
        "note      hello",
        "step   5/100  loss 4.0000  grad 1.25  lr 3.00e-04  4,096 tok/s  157 GFLOP/s  mem 1.50G  data 1%  eta 1m01s",
        "valid     step 25  loss 5.1234  16,384 targets  1.0 s",
        "saved     out/checkpoint/step-50  74.4 MB in 0.2 s, training stood still 0.20 s",
        "warning: rank 3: careful",
    ]


def test_a_terminal_has_a_live_line_that_leaves_nothing_behind(monkeypatch) -> None:
    text = shown([step(5), Progress("step", 6, 100, "steps"), Note("hello")], monkeypatch, terminal=True)
    assert "step 5/100" in text
    assert "step 6/100" in text
    assert "\r\033[2K" in text
    screen = text.split("\n")
    assert screen[-1].endswith("\r\033[2K")


def test_a_live_line_is_cut_at_the_edge_of_the_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = shown([step(5)], monkeypatch, terminal=True, color="never")
    live = text.split("\r\033[2K")[1]
    assert len(live) == 39


def test_progress_has_a_rate_and_an_end() -> None:
    assert progress_line(Progress("read", 40, 100, "rows"), 2.0, 20.0) == "read      40 / 100 rows  10 rows/s  6s left"
    assert (
        progress_line(Progress("fetch", 2e6, 4e6, "bytes"), 1.0, 1e6) == "fetch     2.0 MB / 4.0 MB  1.0 MB/s  2s left"
    )
    assert progress_line(Progress("read", 40, None, "rows"), 0.0, 0.0) == "read      40 rows"


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch) -> None:
    events = [Progress("read", number, 1000, "rows") for number in range(1, 1001)]
    lines = shown(events, monkeypatch).splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[-1].startswith("read      1,000 / 1,000 rows")


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    seen = []
    with Display(Output()) as display:
        for event in (step(5), Note("hello"), Warned("careful")):
            display(event)
            seen.append(event)
    assert len(seen) == 3


def test_a_signal_is_answered_while_the_main_thread_is_busy() -> None:
    told: list[tuple[str, float]] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with SignalNotice(lambda name: told.append((name, time.monotonic()))):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [name for name, _ in told] == ["SIGUSR1"]  # once, however often it comes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_that_is_ended_gives_no_notice() -> None:
    told: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        with SignalNotice(told.append):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(1)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == []


def test_quiet_shows_warnings_only(monkeypatch) -> None:
    assert shown([step(5), Note("x"), Warned("careful")], monkeypatch, mode="quiet") == "warning: careful\n"


def test_generated_text_goes_to_stdout(monkeypatch, capsys) -> None:
    with Display(Output()) as display:
        display(Text("def "))
        display(Text("main"))
    assert capsys.readouterr().out == "def main"


def test_a_known_device_shows_its_mfu() -> None:
    assert "157 GFLOP/s  mfu 45.1%" in step_line(step(5, mfu=0.451))


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_step_lines_fit_into_the_terminal(columns: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown([step(5)], monkeypatch, terminal=True, color="never")
    line = text.split("\n")[0]
    assert len(line) <= columns
    assert "loss 4.0000" in line
    assert "4,096 tok/s" in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3660, "1h01m"), (200000, "2d07h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (74_400_000, "74.4 MB"), (3e15, "3000.0 TB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_sparkline_keeps_the_ends() -> None:
    drawn = sparkline([float(100 - i) for i in range(100)])
    assert len(drawn) == 32
    assert drawn[0] == "█"
    assert drawn[-1] == "▁"
    assert sparkline([2.0, 2.0]) == "▁▁"


def test_a_step_of_experts_has_the_load_of_the_busiest_one() -> None:
    event = dataclasses.replace(step(5), extra={"experts/max_load": 1.727})
    assert "  experts 1.73x  " in step_line(event)
