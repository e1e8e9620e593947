"""Trains the benchmark's Llama with transformers' Trainer; prints one JSON line a step."""

import json
import os
import sys
import tempfile
import time

START = time.perf_counter()
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

job = json.loads(sys.argv[1])
batches = np.load(job["data"])
torch.manual_seed(0)
shape = job["model"]
config = transformers.LlamaConfig(
    vocab_size=shape["vocab_size"],
    hidden_size=shape["dim"],
    intermediate_size=shape["ffn_dim"],
    num_hidden_layers=shape["n_layers"],
    num_attention_heads=shape["n_heads"],
    num_key_value_heads=shape["n_kv_heads"],
    max_position_embeddings=batches.shape[-1],
)
config.rope_theta = 500000.0
config.rms_norm_eps = 1e-5
model = transformers.LlamaForCausalLM(config)
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def load_weights() -> None:
    """Start from the benchmark's weights: other names, and the rotary pairs as halves."""
    state = {}
    for name, array in np.load(job["weights"]).items():
        tensor = torch.from_numpy(array)
        if ".wq." in name or ".wk." in name:
            heads = shape["n_heads"] if ".wq." in name else shape["n_kv_heads"]
            tensor = tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[{"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(name, name)] = tensor
    model.load_state_dict(state)


load_weights()


class Rows(torch.utils.data.Dataset):
    """The batches' rows in order, as the trainer collates them."""

    def __len__(self) -> int:
        return batches.shape[0] * batches.shape[1]

    def __getitem__(self, index: int) -> dict:
        row = torch.from_numpy(batches.reshape(-1, batches.shape[-1])[index][:-1].astype(np.int64))
        return {"input_ids": row, "labels": row}


class Timer(transformers.TrainerCallback):
    """Prints what each step took."""

    def on_step_begin(self, *args, **kwargs) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        line = {
            "step": state.global_step,
            "cpu": time.process_time() - self.cpu,
            "wall": time.perf_counter() - self.wall,
            "since_start": time.perf_counter() - START,
        }
        print(json.dumps(line), flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            print(json.dumps({"loss": float(logs["loss"])}), flush=True)


class InOrder(transformers.Trainer):
    """Reads the rows as they come."""

    def _get_train_sampler(self, *_args, **_kwargs):
        return torch.utils.data.SequentialSampler(Rows())


with tempfile.TemporaryDirectory() as folder:
    options = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batches.shape[1],
        max_steps=batches.shape[0],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=options, train_dataset=Rows(), callbacks=[Timer()])
    sys.stdout.flush()
    trainer.train()
os._exit(0)
