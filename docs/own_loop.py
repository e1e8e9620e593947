"""A loop of your own over titan's parts: a large and a small model train in one process, by turns, on the same data.

Run it with `python docs/own_loop.py`, or on ranks: `torchrun --standalone --nproc-per-node 2 docs/own_loop.py`.
"""

from titan_core.checkpoint import Checkpointer
from titan_core.config.load import load
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training.build import build
from titan_core.training.state import Progress, snapshot
from titan_core.training.step import forward_backward

STEPS = 5
SHARED = {"training.seq_len": "64", "training.local_batch_size": "4", "training.mixed_precision_param": "float32"}
SIZES = {"large": {"model.args.dim": "128", "model.args.n_layers": "4"}, "small": {"model.args.dim": "64"}}

world = distributed.start()  # one process, or the rank that torchrun says
engines = {
    name: build(load("llama3_debugmodel", [*SHARED.items(), *sizes.items()]).config, world, silent)
    for name, sizes in SIZES.items()
}
for step in range(1, STEPS + 1):
    for name, parts in engines.items():
        outcome = forward_backward(parts, lambda parts=parts: next(parts.loader))  # any layout, any accumulation
        parts.update(1e-3)
        if world.is_main:
            print(f"step {step} {name}: loss {outcome.loss:.3f}, gradient norm {outcome.grad_norm:.2f}")
for name, parts in engines.items():
    saver = Checkpointer(f"outputs/{name}", parts.config.checkpoint, rank=world.rank, size=world.size, listener=silent)
    progress = Progress(step=STEPS, tokens=STEPS * parts.global_batch * 64)
    saver.save(STEPS, snapshot(parts, progress, {}), blocking=True)  # `titan generate llm --checkpoint outputs/large`
    parts.loader.close()
distributed.stop()
