"""Trains the benchmark's Llama with litgpt's pretraining loop; prints one JSON line a step."""

import json
import os
import sys
import tempfile
import time

START = time.perf_counter()
import numpy as np  # noqa: E402
import torch  # noqa: E402
from litgpt import Config, pretrain  # noqa: E402
from litgpt.args import EvalArgs, LogArgs, TrainArgs  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

job = json.loads(sys.argv[1])
batches = np.load(job["data"])
shape = job["model"]
LAST = {"cpu": time.process_time(), "wall": time.perf_counter(), "step": 0}


class Rows(torch.utils.data.Dataset):
    """The batches' rows in order."""

    def __len__(self) -> int:
        return batches.shape[0] * batches.shape[1]

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(batches.reshape(-1, batches.shape[-1])[index].astype(np.int64))


class Data(DataModule):
    """Hands the rows to litgpt."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Rows(), batch_size=self.batch_size, shuffle=False)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Rows(), batch_size=self.batch_size)


def report(*_: object) -> None:
    """Print what the step took, after each optimizer step."""
    LAST["step"] += 1
    line = {
        "step": LAST["step"],
        "cpu": time.process_time() - LAST["cpu"],
        "wall": time.perf_counter() - LAST["wall"],
        "since_start": time.perf_counter() - START,
    }
    print(json.dumps(line), flush=True)
    LAST["cpu"], LAST["wall"] = time.process_time(), time.perf_counter()


def load_weights(model: torch.nn.Module) -> None:
    """Start from the benchmark's weights: other names, one matrix for q, k and v, the rotary pairs as halves."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(job["weights"]).items()}

    def halves(name: str, heads: int) -> torch.Tensor:
        tensor = arrays[name]
        return tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)

    state = {
        "lm_head.weight": arrays["output.weight"],
        "transformer.wte.weight": arrays["tok_embeddings.weight"],
        "transformer.ln_f.weight": arrays["norm.weight"],
    }
    for i in range(shape["n_layers"]):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        qkv = [
            halves(f"{ours}.attention.wq.weight", shape["n_heads"]),
            halves(f"{ours}.attention.wk.weight", shape["n_kv_heads"]),
            arrays[f"{ours}.attention.wv.weight"],
        ]
        state |= {
            f"{theirs}.norm_1.weight": arrays[f"{ours}.attention_norm.weight"],
            f"{theirs}.norm_2.weight": arrays[f"{ours}.ffn_norm.weight"],
            f"{theirs}.attn.qkv.weight": torch.cat(qkv),
            f"{theirs}.attn.proj.weight": arrays[f"{ours}.attention.wo.weight"],
            f"{theirs}.mlp.fc_1.weight": arrays[f"{ours}.feed_forward.w1.weight"],
            f"{theirs}.mlp.fc_2.weight": arrays[f"{ours}.feed_forward.w3.weight"],
            f"{theirs}.mlp.proj.weight": arrays[f"{ours}.feed_forward.w2.weight"],
        }
    model.load_state_dict(state)


pretrain.initialize_weights = lambda fabric, model, **_: load_weights(model)
register_optimizer_step_post_hook(report)
with tempfile.TemporaryDirectory() as folder:
    pretrain.setup(
        model_name="bench",
        model_config=Config(
            name="bench",
            block_size=batches.shape[-1] - 1,
            vocab_size=shape["vocab_size"],
            padded_vocab_size=shape["vocab_size"],
            n_layer=shape["n_layers"],
            n_head=shape["n_heads"],
            n_query_groups=shape["n_kv_heads"],
            n_embd=shape["dim"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=shape["ffn_dim"],
            rope_base=500000,
            norm_eps=1e-5,
        ),
        out_dir=folder,
        precision="bf16-mixed",
        data=Data(),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=batches.shape[1],
            micro_batch_size=batches.shape[1],
            max_tokens=int(batches.shape[0] * batches.shape[1] * (batches.shape[2] - 1)),
            max_seq_length=batches.shape[-1] - 1,
            lr_warmup_steps=0,
            max_norm=1.0,
            min_lr=job["lr"],
        ),
        eval=EvalArgs(interval=10**9, initial_validation=False, final_validation=False, max_iters=1),
        log=LogArgs(),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job["lr"], "weight_decay": 0.1, "betas": (0.9, 0.95), "fused": True},
        },
        devices=1,
        num_nodes=1,
        seed=0,
        logger_name="csv",
    )
os._exit(0)
