"""Trains the benchmark's Llama with torchtitan 0.2's Trainer on a CPU; prints one JSON line a step.

torchtitan has no CPU path, so the device questions that it asks are answered here; its model, trainer, optimizer and
data flow are its own.
"""

import json
import os
import sys
import tempfile
import time

START = time.perf_counter()
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import socket  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])

from torchtitan.tools import utils  # noqa: E402

MODULE = SimpleNamespace(
    set_device=lambda *_: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    synchronize=lambda *_: None,
    get_device_name=lambda *_: "cpu",
    get_device_properties=lambda *_: SimpleNamespace(total_memory=1 << 34),
    reset_peak_memory_stats=lambda *_: None,
    empty_cache=lambda: None,
    memory_stats=lambda *_: {},
)
utils.device_type, utils.device_module = "cpu", MODULE
utils.get_peak_flops = lambda *_: 1e12

import torchtitan.components.metrics as metrics  # noqa: E402
import torchtitan.train as train  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.models import llama3  # noqa: E402
from torchtitan.models.llama3.model.args import TransformerModelArgs  # noqa: E402
from torchtitan.protocols.train_spec import get_train_spec  # noqa: E402

for module_name, module in list(sys.modules.items()):
    for name, value in (("device_type", "cpu"), ("device_module", MODULE)):
        if module_name.startswith("torchtitan") and hasattr(module, name):
            setattr(module, name, value)
utils.get_device_info = lambda: ("cpu", MODULE)

job = json.loads(sys.argv[1])
batches = np.load(job["data"])
shape = job["model"]


class Loader:
    """The batches in order."""

    def __iter__(self):
        for batch in batches:
            rows = torch.from_numpy(batch.astype(np.int64))
            yield {"input": rows[:, :-1]}, rows[:, 1:]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Memory:
    """Stands in for the monitor of a GPU's memory."""

    device_name = "cpu"

    def get_peak_stats(self) -> SimpleNamespace:
        zeros = dict.fromkeys(
            (
                "max_active_gib",
                "max_active_pct",
                "max_reserved_gib",
                "max_reserved_pct",
                "num_alloc_retries",
                "num_ooms",
            ),
            0,
        )
        return SimpleNamespace(**zeros)

    def reset_peak_stats(self) -> None:
        pass


metrics.build_device_memory_monitor = Memory
llama3.llama3_args["bench"] = TransformerModelArgs(
    dim=shape["dim"],
    n_layers=shape["n_layers"],
    n_heads=shape["n_heads"],
    n_kv_heads=shape["n_kv_heads"],
    vocab_size=shape["vocab_size"],
    multiple_of=shape["ffn_dim"],
)
spec = get_train_spec("llama3")
spec.build_dataloader_fn = lambda **_: Loader()
spec.build_tokenizer_fn = lambda *_: SimpleNamespace(eos_id=0)
train.train_spec_module.get_train_spec = lambda _: spec
LAST = {"cpu": time.process_time(), "wall": time.perf_counter(), "step": 0}
original = train.Trainer.train_step


def timed(self, iterator) -> None:
    """Run a step and print what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    original(self, iterator)
    LAST["step"] += 1
    line = {
        "step": LAST["step"],
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "since_start": time.perf_counter() - START,
    }
    print(json.dumps(line), flush=True)


train.Trainer.train_step = timed
log = metrics.MetricsProcessor.log
metrics.MetricsProcessor.log = lambda self, step, loss, *a, **k: print(json.dumps({"loss": float(loss)}), flush=True)
with tempfile.TemporaryDirectory() as folder:
    words = {
        "job.dump_folder": folder,
        "model.name": "llama3",
        "model.flavor": "bench",
        "model.hf_assets_path": folder,
        "optimizer.lr": job["lr"],
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0.0,
        "training.local_batch_size": batches.shape[1],
        "training.seq_len": batches.shape[2] - 1,
        "training.steps": batches.shape[0],
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": 1,
    }
    config = ConfigManager().parse_args([f"--{key}={value}" for key, value in words.items()])
    trainer = train.Trainer(config)
    state = {name: torch.from_numpy(array) for name, array in np.load(job["weights"]).items()}
    trainer.model_parts[0].load_state_dict(state)
    trainer.maybe_enable_amp = torch.autocast("cpu", dtype=torch.bfloat16)
    trainer.train()
os._exit(0)
