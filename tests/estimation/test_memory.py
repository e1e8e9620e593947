"""Estimated bytes against those of a model that is there."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.ranks import run_ranks
from tests.runs import tiny
from titan_core.data.loader import Batch
from titan_core.declare.family import Family
from titan_core.estimation.memory import Memory, rank_memory
from titan_core.models import resolve
from titan_core.optim.build import build_optimizer, state_tensors
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.runtime.distributed import World
from titan_core.training.build import build_model


def estimate(config, shards: int = 1) -> Memory:
    family, sizes = resolve(config.model)
    replicas = config.parallelism.data_parallel_replicate_degree
    return rank_memory(
        config,
        family.parameters(sizes),
        family.attentions(sizes),
        sizes.vocab_size,
        Layout(dp_replicate=replicas, dp_shard=shards),
    )


def built(config, size: int) -> tuple[torch.nn.Module, Family, object]:
    family, sizes = resolve(config.model)
    world = World(size=size, rank=torch.distributed.get_rank() if size > 1 else 0)
    mesh = Mesh(Layout.of(config.parallelism, size), "cpu", world.rank)
    return build_model(config, world, mesh, family, sizes, 0, 8).models[0], family, sizes


def _local_bytes(config, size: int) -> tuple[int, int]:
    model, family, sizes = built(config, size)
    optimizer = build_optimizer(dict(model.named_parameters()), family.parameters(sizes), config.optimizer)
    moments = [t for name, t in state_tensors(optimizer).items() if not name.endswith(".step")]
    return sum(map(_bytes, model.parameters())), sum(map(_bytes, moments))


def _bytes(tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_optimizer_are_exact(dtype: str, tmp_path) -> None:
    config = tiny(tmp_path, training__dtype=dtype).config
    found = estimate(config)
    assert (found.weights, found.optimizer) == _local_bytes(config, 1)
    assert found.gradients == found.weights
    assert found.gathered == (0 if dtype == "float32" else estimate(tiny(tmp_path).config).weights)


def test_shards_are_exact(tmp_path) -> None:
    config = tiny(tmp_path, parallelism__data_parallel_shard_degree=2).config
    found = estimate(config, shards=2)
    for weights, moments in run_ranks(_local_bytes, 2, config, 2):
        assert weights == found.weights
        assert moments == found.optimizer
    whole = estimate(config).weights
    assert whole / 2 < found.gathered <= whole


def saved_bytes(config) -> int:
    """Bytes of activations that the backward of the blocks holds."""
    model, *_ = built(config, 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(config.training.local_batch_size, config.training.seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(tokens, torch.arange(tokens.shape[1]))  # type: ignore[operator]
    return sum(storage.nbytes() for storage in held.values())


SHAPE = {
    "model__args__dim": 128,
    "model__args__ffn_dim": 384,
    "model__args__n_layers": 4,
    "training__local_batch_size": 16,
    "training__seq_len": 16,
}


def test_a_tied_table_lies_in_two_stages(tmp_path) -> None:
    config = tiny(tmp_path, **{"model.args.tied": True, "parallelism__pipeline_parallel_degree": 2}).config
    family, sizes = resolve(config.model)
    parameters = family.parameters(sizes)
    two, one = (rank_memory(config, parameters, family.attentions(sizes), 2048, Layout(pp=pp)).weights for pp in (2, 1))
    assert two == (one + 4 * 2048 * sizes.dim) // 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_near_what_is_saved(dtype: str, tmp_path) -> None:
    settings = {**SHAPE, "training__mixed_precision_param": dtype, "activation_checkpoint__mode": "none"}
    config = tiny(tmp_path, **settings).config
    assert estimate(config).activations == pytest.approx(saved_bytes(config), rel=0.25)


def test_recomputation_keeps_the_inputs_of_blocks(tmp_path) -> None:
    config = tiny(tmp_path, activation_checkpoint__mode="full", **SHAPE).config
    boundary = 16 * 16 * 128 * 4
    assert saved_bytes(config) == pytest.approx(4 * boundary, rel=0.5)
    one_block = estimate(tiny(tmp_path, activation_checkpoint__mode="none", **SHAPE).config).activations / 4
    assert estimate(config).activations == pytest.approx(4 * boundary + one_block)


def test_more_recomputation_needs_less(tmp_path) -> None:
    def activations(mode: str, **more: object) -> int:
        return estimate(tiny(tmp_path, activation_checkpoint__mode=mode, **SHAPE, **more).config).activations

    by_op = activations("selective", activation_checkpoint__selective_ac_option="op")
    half = activations("selective", activation_checkpoint__selective_ac_option="2")
    assert activations("full") < by_op < activations("none")
    assert activations("full") < half < activations("none")


def kept_by_fsdp(config, size: int, microbatches: int) -> tuple[int, int]:
    """Bytes of whole gradients before the last microbatch, and of gathered blocks between forward and backward."""
    family, sizes = resolve(config.model)
    world = World(size=size, rank=torch.distributed.get_rank() if size > 1 else 0)
    mesh = Mesh(Layout.of(config.parallelism, size), "cpu", world.rank)
    built = build_model(config, world, mesh, family, sizes, 0, 8)
    task, parallel = built.task, built.parallel
    tokens = torch.zeros(config.training.local_batch_size, config.training.seq_len, dtype=torch.long)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32))
    states = [m._get_fsdp_state() for m in task.modules() if isinstance(m, FSDPModule)]
    parameters = [p for s in states if s._fsdp_param_group for p in s._fsdp_param_group.fsdp_params]
    gradients = gathered = 0
    for index in range(microbatches):
        with parallel.accumulate(last=index == microbatches - 1):
            loss = parallel.module(batch)
            if index == 0:
                outputs = [out for p in parameters for out in p.all_gather_outputs]
                gathered = sum(out.untyped_storage().nbytes() for out in outputs)
            loss.backward()
        if index == microbatches - 2:
            held = [p.unsharded_accumulated_grad for p in parameters]
            held += [p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param")]
            gradients = sum(_bytes(grad) for grad in held if grad is not None)
    return gradients, gathered


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_accumulation_keeps_whole_gradients(reduce: str, tmp_path) -> None:
    settings = {
        "training__mixed_precision_param": "bfloat16",
        "training__mixed_precision_reduce": reduce,
        "parallelism__data_parallel_shard_degree": 4,
        "training__local_batch_size": 1,
    }
    once, twice = (tiny(tmp_path, training__global_batch_size=n, **settings).config for n in (4, 8))
    ((kept, _), *_rest) = run_ranks(kept_by_fsdp, 4, twice, 4, 2)
    assert estimate(twice, shards=4).gradients == kept > estimate(once, shards=4).gradients
    assert estimate(once, shards=4).gradients == estimate(once, shards=4).weights


def test_replicas_share_a_batch(tmp_path) -> None:
    """Four sequences are one microbatch on 2 x 2 ranks, and two on 1 x 2."""
    more = {"training__local_batch_size": 1, "training__global_batch_size": 4}
    two, one = (
        estimate(tiny(tmp_path, parallelism__data_parallel_replicate_degree=n, **more).config, shards=2) for n in (2, 1)
    )
    assert two.gradients == two.weights
    assert one.gradients == 2 * one.weights


def test_blocks_that_are_not_freed_are_counted(tmp_path) -> None:
    more = {"model__args__n_layers": 5, "parallelism__data_parallel_shard_degree": 2}
    freed, kept = (
        tiny(tmp_path, parallelism__fsdp_reshard_after_forward=when, **more).config for when in ("default", "never")
    )
    ((_, gathered), *_rest) = run_ranks(kept_by_fsdp, 2, kept, 2, 1)
    assert estimate(kept, shards=2).gathered == pytest.approx(gathered, rel=0.01)
    assert estimate(freed, shards=2).gathered < gathered


def test_offload_puts_shares_on_the_host(tmp_path) -> None:
    settings = {"training__local_batch_size": 4, "training__enable_cpu_offload": True}
    found, accumulated = (estimate(tiny(tmp_path, training__global_batch_size=n, **settings).config) for n in (4, 8))
    for memory in (found, accumulated):
        assert memory.host == 4 * memory.weights
        assert memory.total == sum(memory.parts().values())
        assert "host" not in memory.parts()
    assert found.weights + found.gradients + found.optimizer == found.host
    assert accumulated.gradients - found.gradients == found.weights  # fp32, whole, on the device
    assert estimate(tiny(tmp_path).config).host == 0
