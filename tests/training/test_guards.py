"""Steps that go wrong: stop, skip or roll back, alone and inside a run."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import losses, tiny
from titan_core.config.schema import Guard as Settings
from titan_core.jobs import train
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import StepDone, Warned
from titan_core.training.guards import Guard, dump


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_non_finite(policy: str, loss: float, norm: float) -> None:
    guard = Guard(Settings(non_finite=policy))
    assert guard.judge(2.0, 1.0) == "go"
    assert guard.judge(loss, norm) == policy
    assert "gradient norm" in guard.reason


def test_spikes_are_judged_by_the_running_deviation() -> None:
    guard = Guard(Settings(spike="skip", spike_window=10, spike_factor=5.0))
    for step in range(30):
        assert guard.judge(2.0 + 0.1 * (-1) ** step, 1.0) == "go"
    assert guard.mean == pytest.approx(2.0, abs=0.05)
    assert math.sqrt(guard.variance) == pytest.approx(0.1, rel=0.1)
    assert guard.judge(2.4, 1.0) == "go"
    assert guard.judge(4.0, 1.0) == "skip"
    assert guard.judge(2.0, 1.0) == "go"
    assert Guard(Settings(spike_window=1)).judge(1e9, 1.0) == "go"


def test_too_many_skips_stop() -> None:
    guard = Guard(Settings(non_finite="skip", max_skips=2))
    assert [guard.judge(math.nan, 1.0) for _ in range(3)] == ["skip", "skip", "stop"]
    assert "max_skips" in guard.reason


def test_state_round_trip() -> None:
    guard, other = Guard(Settings()), Guard(Settings())
    for loss in (3.0, 2.5, 2.0):
        guard.judge(loss, 1.0)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()


def test_a_level_that_rises_for_good_stops_the_run() -> None:
    guard = Guard(Settings(spike="skip", spike_window=5, max_skips=3))
    for step in range(10):
        guard.judge(2.0 + 0.01 * (step % 2), 1.0)
    assert [guard.judge(9.0, 1.0) for _ in range(4)] == ["skip"] * 3 + ["stop"]
    assert guard.mean == pytest.approx(2.0, abs=0.02)  # what was skipped is not remembered


@pytest.mark.parametrize("window", [1, 4, 50])
def test_running_numbers_are_the_exact_ones_until_the_window_is_full(window: int) -> None:
    losses = [5.0, 4.0, 4.5, 3.0][:window]
    guard = Guard(Settings(spike_window=window))
    for loss in losses:
        guard.judge(loss, 1.0)
    assert guard.mean == pytest.approx(sum(losses) / len(losses))
    assert guard.variance == pytest.approx(sum((x - guard.mean) ** 2 for x in losses) / len(losses))


def test_a_dump_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    said = dump(str(tmp_path / "run"), 61, "loss nan", {}, 0, Guard(Settings()))
    assert said == f"{tmp_path / 'run' / 'stopped-at-step-61.json'} could not be written: File exists"


def test_dump_puts_the_culprit_first(tmp_path: Path) -> None:
    guard = Guard(Settings())
    for number in range(60):
        guard.judge(float(number), 1.0)
    guard.judge(math.nan, math.inf)
    norms = {"small": 0.1, "broken": math.inf, "large": 7.0}
    written = json.loads(Path(dump(str(tmp_path / "run"), 61, guard.reason, norms, 488, guard)).read_text())
    assert list(written["grad_norms"].items()) == [("broken", "inf"), ("large", 7.0), ("small", 0.1)]
    assert written["recent_losses"] == [float(n) for n in range(11, 60)] + ["nan"]
    assert written["recent_grad_norms"][-1] == "inf"
    assert (written["step"], written["first_row"]) == (61, 488)
    assert "loss nan" in written["reason"]


class Poison:
    """Makes the loss of chosen batches NaN, by their order of reading, once each."""

    def __init__(self, monkeypatch, batches: set[int]) -> None:
        from titan_core.tasks.causal_lm import CausalLM

        self.left, self.read = set(batches), 0
        original = CausalLM.forward

        def forward(task, batch):
            self.read += 1
            loss = original(task, batch)
            if self.read in self.left:
                self.left.discard(self.read)
                return loss * math.nan
            return loss

        monkeypatch.setattr(CausalLM, "forward", forward)


def run(resolved) -> tuple[list[StepDone], list[str], train.TrainResult]:
    steps, warnings = [], []

    def listen(event) -> None:
        if isinstance(event, StepDone):
            steps.append(event)
        elif isinstance(event, Warned):
            warnings.append(event.text)

    return steps, warnings, train.run(resolved, listener=listen)


ONE = {"training__local_batch_size": 8, "training__steps": 8}


def test_stop_leaves_a_dump_and_the_last_checkpoint(tmp_path: Path, monkeypatch) -> None:
    Poison(monkeypatch, {5})
    resolved = tiny(tmp_path, checkpoint__enable=True, checkpoint__interval=2, **ONE)
    with pytest.raises(RunFailed, match="step 5 went wrong") as caught:
        run(resolved)
    written = json.loads(Path(caught.value.where).read_text())
    assert written["step"] == 5
    assert set(written["grad_norms"].values()) == {"nan"}
    assert written["recent_losses"][-1] == "nan"
    assert all(isinstance(loss, float) for loss in written["recent_losses"][:-1])
    assert len(written["recent_losses"]) == len(written["recent_grad_norms"]) == 5
    assert written["guard"]["non_finite"] == "stop"
    assert (tmp_path / "checkpoint" / "step-4").is_dir()
    assert not (tmp_path / "checkpoint" / "step-5").exists()


def test_skip_leaves_the_weights_alone(tmp_path: Path, monkeypatch) -> None:
    Poison(monkeypatch, {5})
    steps, warnings, result = run(tiny(tmp_path, guard__non_finite="skip", **ONE))
    assert result.step == 8
    assert any("step 5 is skipped" in text for text in warnings)
    assert all(math.isfinite(event.loss) for event in steps if event.step != 5)


def test_rollback_passes_over_the_data(tmp_path: Path, monkeypatch) -> None:
    clean = losses(tiny(tmp_path / "clean", **{**ONE, "training__steps": 10}))
    Poison(monkeypatch, {6})
    settings = {**ONE, "checkpoint__enable": True, "checkpoint__interval": 2, "guard__non_finite": "rollback"}
    steps, warnings, result = run(tiny(tmp_path / "run", **settings))
    assert result.step == 8
    assert any("back to step 4" in text for text in warnings)
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert [event.loss for event in steps[:5]] == clean[:5]
    assert steps[5].loss != clean[4]


def test_rollback_without_checkpoint_stops(tmp_path: Path, monkeypatch) -> None:
    Poison(monkeypatch, {3})
    with pytest.raises(RunFailed, match="no checkpoint to roll back to"):
        run(tiny(tmp_path, guard__non_finite="rollback", **ONE))


def _clipped(kind: str) -> tuple[float, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from titan_core.parallel.clip import clip_grad_norm

    mesh = init_device_mesh("cpu", (2,))
    grads = [torch.arange(12.0).view(4, 3), torch.full((6,), 2.0), torch.ones(2, 2)]
    placed = {
        "plain": grads,
        "sharded": [distribute_tensor(g, mesh, [Shard(0)]) for g in grads],
        "mixed": [
            distribute_tensor(grads[0], mesh, [Shard(0)]),
            grads[1],
            distribute_tensor(grads[2], mesh, [Replicate()]),
        ],
    }[kind]
    parameters = []
    for grad in placed:
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        parameters.append(parameter)
    norm = clip_grad_norm(parameters, 1.0)
    full = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return norm.item(), torch.cat([g.flatten() for g in full])


@pytest.mark.parametrize("kind", ["plain", "sharded", "mixed"])
def test_clipping_over_mixed_meshes(kind: str) -> None:
    grads = torch.cat([torch.arange(12.0), torch.full((6,), 2.0), torch.ones(4)])
    for norm, clipped in run_ranks(_clipped, 2, kind):
        assert norm == pytest.approx(grads.norm().item(), rel=1e-6)
        assert torch.allclose(clipped, grads / grads.norm(), atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_leaves_gradients_alone_when_the_norm_is_not_finite(bad: float) -> None:
    from titan_core.parallel.clip import clip_grad_norm

    good, broken = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    good.grad, broken.grad = torch.full((3,), 5.0), torch.tensor([1.0, bad, 2.0])
    assert not clip_grad_norm([good, broken], 1.0).isfinite()
    assert good.grad.tolist() == [5.0] * 3
    assert broken.grad[::2].tolist() == [1.0, 2.0]
