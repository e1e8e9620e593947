"""The config tree: one frozen dataclass a section; the docstring under a field is its help.

Sections and keys keep the names that users of torchtitan 0.2 know, so that their TOML files run unchanged; keys that
titan adds stand last in a section or in sections of their own (`data`, `guard`). Ranges and choices stand in the types
and are checked before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
AutoDegree = Annotated[int, Meta(ge=-1)]
Policy = Literal["ignore", "stop", "skip", "rollback"]


@dataclass(frozen=True)
class Job:
    """Where a run lives and what it is called."""

    dump_folder: str = "./outputs"
    """Folder of the run: checkpoints, metrics.jsonl, traces. Short form on the command line: `--run DIR`."""
    description: str = "default job"
    """One line about the run, stored with it."""
    print_config: bool = False
    """Print the resolved config before training."""
    config_file: str | None = None
    """The TOML file that this config was read from (set by the loader)."""
    custom_config_module: str = ""
    """Python module with a `JobConfig` dataclass to merge into the schema."""


@dataclass(frozen=True)
class Profiling:
    """Profiler traces and memory snapshots."""

    enable_profiling: bool = False
    """Write profiler traces (CPU and, where there is one, the accelerator)."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside the dump folder."""
    profile_freq: Positive = 10
    """Steps from one trace to the next."""
    profiler_active: Positive = 1
    """Steps that one trace records."""
    profiler_warmup: NonNegative = 3
    """Steps that the profiler warms up before it records."""
    enable_memory_snapshot: bool = False
    """Write memory snapshots: the allocator's history on a GPU, tensors by size on a CPU."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside the dump folder."""
    memory_snapshot_freq: NonNegative = 0
    """Steps from one memory snapshot to the next; 0: as `profile_freq`."""


@dataclass(frozen=True)
class Metrics:
    """What is logged, and where."""

    log_freq: Positive = 10
    """Steps from one log line to the next."""
    enable_tensorboard: bool = False
    """Write TensorBoard event files (extra `logging`)."""
    disable_color_printing: bool = False
    """Print without colour."""
    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, inside the dump folder."""
    save_for_all_ranks: bool = False
    """Write metric files on every rank instead of one."""
    enable_wandb: bool = False
    """Log to Weights & Biases (extra `logging`)."""


@dataclass(frozen=True)
class Model:
    """Which model is trained."""

    name: str = "llama3"
    """Model family: a folder in titan_core/models."""
    flavor: str = "debugmodel"
    """Named size of the family."""
    hf_assets_path: str = ""
    """Folder with tokenizer files (and weights to start from); empty: the built-in tokenizer."""
    tokenizer_path: str | None = None
    """Deprecated: use `hf_assets_path`."""
    converters: list[str] = field(default_factory=list)
    """Model converters: `quantize.linear.float8` or `quantize.linear.mx`, and `quantize.grouped_mm.float8` or
    `quantize.grouped_mm.mx` for experts."""
    print_after_conversion: bool = False
    """Print the model before training."""
    args: dict[str, Any] = field(default_factory=dict)
    """Sizes that replace the flavor's, e.g. `[model.args] n_layers = 4`."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that get their own hyper-parameters: the first group that matches wins."""

    pattern: str
    """Glob over parameter names, e.g. `layers.*.attention.*`."""
    lr_factor: NonNegativeFloat = 1.0
    """Multiplies the learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Replaces the weight decay."""


@dataclass(frozen=True)
class Optimizer:
    """The optimizer."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer."""
    lr: NonNegativeFloat = 8e-4
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of every parameter whose role is not in `no_decay_roles`."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed: one kernel, one call a kind of operation, or parameter by parameter."""
    early_step_in_backward: bool = False
    """Step each parameter as soon as its gradient is ready."""
    no_decay_roles: list[str] = field(default_factory=lambda: ["norm", "bias"])
    """Parameter roles without weight decay: embedding, hidden, output, norm, bias, expert, router."""
    param_groups: list[ParamGroup] = field(default_factory=list)
    """Groups by name pattern, on top of the roles."""


@dataclass(frozen=True)
class LRScheduler:
    """Warmup, stable phase, decay."""

    warmup_steps: NonNegative = 200
    """Steps of linear warmup."""
    decay_ratio: Fraction | None = None
    """Share of the steps that decay; unset: all after the warmup."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Fraction = 0.0
    """The decay ends at this share of the peak."""


@dataclass(frozen=True)
class Training:
    """Batch, length, precision."""

    dataset: str = "embedded"
    """`embedded` (the standard library's text, or drawn shapes; no network), `c4`, `c4_test`, `c4_validation`, `local`,
    or a Hub repository `org/name`; for images also `cc12m-wds`, `cc12m-test`, `coco-validation`."""
    dataset_path: str | None = None
    """Local file, folder or glob that replaces the data set's own location: txt, jsonl, parquet; for images tar files
    (webdataset), a folder of images with captions, or what `titan data encode-flux` wrote."""
    local_batch_size: Positive = 8
    """Sequences a data-parallel rank computes at once."""
    global_batch_size: int = -1
    """Sequences a step; -1: local_batch_size times the data-parallel ranks. More means gradient accumulation."""
    seq_len: Positive = 2048
    """Tokens a sequence."""
    max_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0: measured, not clipped."""
    steps: Positive = 10000
    """Optimizer steps of the run."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of parameters, gradients and optimizer state."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the computation."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are reduced over ranks."""
    gc_freq: Positive = 50
    """Steps from one garbage collection to the next."""
    gc_debug: bool = False
    """Collect in full at every step and warn of tensors in reference cycles."""
    seed: NonNegative | None = None
    """Seed of weights and data; unset: drawn once and stored with the run."""
    deterministic: bool = False
    """Only deterministic algorithms."""
    debug_moe_force_load_balance: bool = False
    """Send every expert the same number of tokens."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    """Weight of the mean loss of the layers of multi-token prediction (`model.args.num_mtp_layers`), beside the loss of
    the next token. DeepSeek-V3 had 0.3 for 10 of its 14.8 trillion tokens, then 0.1."""
    expert_backend: Literal["auto", "titan", "grouped_mm", "loop"] = "auto"
    """How products of many experts are formed: by titan's kernels, by torch's grouped product, or one by one."""
    time_limit_minutes: PositiveFloat | None = None
    """Save and stop cleanly after this time."""
    img_size: Positive = 256
    """Pixels a side of an image; larger ones are shrunk and cropped, smaller ones left out."""
    classifier_free_guidance_prob: Fraction = 0.0
    """Share of the captions that are left out, so that a model also learns images without one."""
    test_mode: bool = False
    """Draw text encoders and autoencoder at random, from their configs alone: for tests without weights."""


@dataclass(frozen=True)
class Parallelism:
    """How the model is laid out over the ranks."""

    data_parallel_replicate_degree: Positive = 1
    """Copies of the model (DDP; HSDP together with a shard degree)."""
    enable_compiled_autograd: bool = False
    """Compile the backward of DDP."""
    data_parallel_shard_degree: AutoDegree = -1
    """Ranks over which parameters are sharded (FSDP2); -1: the ranks that are left."""
    data_parallel_backend: Literal["fsdp2", "simple"] = "fsdp2"
    """How parameters are sharded: torch's FSDP2, or views that a whole-graph compile sees through."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When gathered parameters are freed: `default` frees after the forward unless pipelining."""
    fsdp_prefetch: NonNegative = 1
    """Blocks whose parameters are gathered ahead of the one that computes."""
    tensor_parallel_degree: Positive = 1
    """Ranks over which each matrix is split."""
    enable_sequence_parallel: bool = True
    """Split the residual stream along the sequence between tensor-parallel regions."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with the matmuls."""
    pipeline_parallel_degree: Positive = 1
    """Pipeline ranks."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Modules of each pipeline stage, by name."""
    pipeline_parallel_first_stage_less_layers: NonNegative = 1
    """Layers that the embedding counts for."""
    pipeline_parallel_last_stage_less_layers: NonNegative = 1
    """Layers that the output counts for."""
    pipeline_parallel_layers_per_stage: Positive | None = None
    """Layers a stage; unset: one stage a rank (two for schedules with several)."""
    pipeline_parallel_schedule: Literal[
        "1F1B",
        "GPipe",
        "Interleaved1F1B",
        "LoopedBFS",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
    ] = "1F1B"
    """Pipeline schedule."""
    pipeline_parallel_schedule_csv: str | None = ""
    """File with a schedule of your own."""
    pipeline_parallel_microbatch_size: Positive = 1
    """Sequences a pipeline microbatch."""
    context_parallel_degree: Positive = 1
    """Ranks over which the sequence is split."""
    context_parallel_rotate_method: Literal["allgather", "alltoall", "heads"] = "allgather"
    """How ranks meet each other's keys: gather all, pass them round the ring, or exchange tokens for heads."""
    expert_parallel_degree: Positive = 1
    """Ranks over which experts are split; they are ranks that otherwise hold other data, or pieces of sequences."""
    expert_tensor_parallel_degree: Positive = 1
    """Ranks over which each expert is split, where experts are split too: `tensor_parallel_degree`; or 1, and experts
    are split over the tensor-parallel ranks as well."""
    expert_parallel_dispatch: Literal["alltoall", "symmetric", "allgather"] = "alltoall"
    """How tokens reach their experts. `alltoall`: each is sent where it is wanted, once the host knows how many are.
    `symmetric`: ranks of one node pull them from memory that all their GPUs address, and no host waits. `allgather`:
    every rank gets all, and no host waits."""
    expert_parallel_capacity: PositiveFloat = 2.0
    """Rows that `symmetric` and `allgather` make room for, as a multiple of the mean; a step that needs more stops the
    run."""


@dataclass(frozen=True)
class Checkpoint:
    """What is saved and loaded, and when."""

    enable: bool = False
    """Save checkpoints, and resume from the newest complete one."""
    enable_ft_dataloader_checkpoints: bool = True
    """Save the data position of every replica under fault tolerance."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, inside the dump folder; or a URL (s3://, gs://, memory://)."""
    interval: Positive = 500
    """Steps from one checkpoint to the next."""
    initial_load_path: str | None = None
    """Checkpoint to start from when the run has none of its own."""
    initial_load_model_only: bool = True
    """Start with the weights only, not with optimizer, schedule and data position."""
    initial_load_in_hf: bool = False
    """The weights to start from are a Hugging Face folder: `initial_load_path`, else `model.hf_assets_path`. Each rank
    reads the bytes of its own shards."""
    initial_load_in_hf_quantized: bool = False
    """They may be block-scaled float8, and are read as plain numbers."""
    last_save_model_only: bool = True
    """Write the weights alone after the last step too, into `weights/` beside the full checkpoint, which is kept: the
    run can be extended."""
    last_save_in_hf: bool = False
    """Write the last step as a Hugging Face folder too, `hf/step-N` beside the full checkpoint, in `export_dtype`: the
    run can be resumed and extended."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of the weights-only export."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save in the background while training goes on."""
    keep_latest_k: NonNegative = 10
    """Newest checkpoints to keep; 0: all."""
    load_step: AutoDegree = -1
    """Step to load; -1: the newest complete one."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts not to load: model, optimizer, lr_scheduler, dataloader, train_state."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too."""
    create_seed_checkpoint: bool = False
    """Write the initial weights as step 0 and stop."""
    load_only: bool = False
    """Load, never save."""
    keep_best_k: NonNegative = 0
    """Best checkpoints by validation loss to keep besides the newest ones."""
    verify: bool = True
    """Check the hash of everything that is read."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Which activations are recomputed in the backward."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """`full`: every block; `selective`: every n-th block or by operation; `memory_budget`: the compiler decides."""
    selective_ac_option: str = "2"
    """A number n (every n-th block) or `op` (save the costly operations, recompute the rest). Without
    `compile.enable`, attention over documents is recomputed on a GPU: it is compiled by itself, and not seen."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """Linear layers that are recomputed in spite of `op`."""
    early_stop: bool = False
    """Stop a recomputation as soon as all that is needed is there."""
    memory_budget: Fraction = 0.5
    """0: recompute all, 1: nothing (needs `compile.enable`)."""
    visualize_memory_budget_pareto: bool = False
    """Write the compiler's trade-off curve."""


@dataclass(frozen=True)
class Compile:
    """torch.compile, block by block."""

    enable: bool = False
    """Compile every block with torch.compile."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled."""
    backend: str = "inductor"
    """Compiler backend."""


@dataclass(frozen=True)
class Float8Linear:
    """Float8 matmuls."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather FSDP parameters in float8: half the bytes of bf16 (tensorwise only)."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute all scales in one reduction before each forward, not in one a weight and gather."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """How many numbers share a scale: `tensorwise` (the default) a whole tensor, `rowwise` a row; `rowwise_with_gw_hp`
    computes the weights' gradients in high precision."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers left in high precision: parts of their names, and `auto_filter_small_kn` for those too small to gain.
    Heads, routers and layers whose sides are no multiples of 16 are always left."""
    emulate: bool = False
    """Emulate float8 where the hardware lacks it: operands are rounded as in float8, the matmuls run in fp32."""


@dataclass(frozen=True)
class MXLinear:
    """MXFP8 matmuls."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel of the cast along dim 1."""
    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp8_emulated", "mxfp8_emulated_rceil"] = (
        "mxfp8_cublas"
    )
    """How the scale of 32 numbers is rounded to a power of two: down (the largest may saturate), or up (`rceil`).
    `emulated` runs the matmuls on rounded operands in high precision, where the hardware lacks MXFP8."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers left in high precision: parts of their names. Heads, routers and layers whose sides are no multiples of 32
    are always left."""


@dataclass(frozen=True)
class QuantizeLinear:
    """Quantized linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    """Float8."""
    mx: MXLinear = field(default_factory=MXLinear)
    """MXFP8."""


@dataclass(frozen=True)
class Float8GroupedMM:
    """Float8 expert matmuls."""

    recipe_name: Literal["blockwise", "rowwise"] = "blockwise"
    """Blockwise: a scale for each 128 numbers of a row and each 128 x 128 weights, all products in float8. Rowwise: a
    scale for each row, and the weights' gradient in high precision."""
    fqns: list[str] = field(default_factory=list)
    """Experts that are quantized: parts of their names; none: all."""


@dataclass(frozen=True)
class MXGroupedMM:
    """MXFP8 expert matmuls."""

    recipe_name: Literal["mxfp8", "mxfp8_wgrad_with_hp", "mxfp8_emulated", "mxfp8_emulated_wgrad_with_hp"] = "mxfp8"
    """`wgrad_with_hp` computes the weights' gradients in high precision. `emulated` forms products of rounded operands
    in high precision, where the hardware lacks MXFP8. 32 numbers share a power of two, rounded up."""
    fqns: list[str] = field(default_factory=list)
    """Experts that are quantized: parts of their names; none: all."""


@dataclass(frozen=True)
class QuantizeGroupedMM:
    """Quantized expert matmuls."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """Float8."""
    mx: MXGroupedMM = field(default_factory=MXGroupedMM)
    """MXFP8."""


@dataclass(frozen=True)
class Quantize:
    """Low-precision matmuls."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
    """Linear layers."""
    grouped_mm: QuantizeGroupedMM = field(default_factory=QuantizeGroupedMM)
    """Experts."""


@dataclass(frozen=True)
class Comm:
    """Collectives: timeouts and traces."""

    init_timeout_seconds: Positive = 300
    """Timeout until the first step is done."""
    train_timeout_seconds: Positive = 100
    """Timeout after it."""
    trace_buf_size: NonNegative = 20000
    """Events that the flight recorder keeps; 0: off."""
    save_traces_folder: str = "comm_traces"
    """Folder of its traces and of the report on a hang, inside the dump folder."""
    save_traces_file_prefix: str = "rank_"
    """Prefix of their names."""


@dataclass(frozen=True)
class MemoryEstimation:
    """Plan instead of training."""

    enable: bool = False
    """Plan a step on ranks that are not there, print what it takes, and stop: the same as `--dry-run`."""
    disable_fake_mode: bool = False
    """Estimate with real tensors."""


@dataclass(frozen=True)
class FaultTolerance:
    """Replica groups that come and go."""

    enable: bool = False
    """Train with torchft."""
    process_group: Literal["gloo", "nccl"] = "gloo"
    """Backend between replica groups."""
    process_group_timeout_ms: Positive = 10000
    """Its timeout."""
    replica_id: NonNegative = 0
    """This replica group."""
    group_size: NonNegative = 0
    """Number of replica groups."""
    min_replica_size: Positive = 1
    """Fewest groups that may train."""
    semi_sync_method: Literal["local_sgd", "diloco"] | None = None
    """Synchronise less often than every step."""
    sync_steps: Positive = 5
    """Steps from one synchronisation to the next."""
    should_quantize: bool = False
    """Quantize what is synchronised."""
    fragment_sync_delay: NonNegative = 0
    """Steps between sending and applying a fragment."""
    fragment_update_alpha: Fraction = 0.0
    """Share of the local weights that is kept."""
    module_fqns_per_model_fragment: list[list[str]] = field(default_factory=list)
    """Modules of each fragment, by name."""
    num_fragments: Positive = 1
    """Number of fragments."""


@dataclass(frozen=True)
class Experimental:
    """Extension points."""

    custom_import: str = ""
    """Python module to import first."""
    custom_args_module: str = ""
    """Deprecated: use `job.custom_config_module`."""


@dataclass(frozen=True)
class Validation:
    """Loss on a fixed slice of held-out data."""

    enable: bool = False
    """Validate during training."""
    dataset: str = "c4_validation"
    """Data set; names as in `training.dataset`."""
    dataset_path: str | None = None
    """Local file, folder or glob that replaces its own location."""
    local_batch_size: Positive = 8
    """Sequences a data-parallel rank computes at once."""
    seq_len: Positive = 2048
    """Tokens a sequence."""
    freq: Positive = 10
    """Steps from one validation to the next."""
    steps: int = -1
    """Batches of a validation; -1: the whole data set."""
    enable_classifier_free_guidance: bool = False
    """Draw sample images with classifier-free guidance."""
    classifier_free_guidance_scale: NonNegativeFloat = 5.0
    """Its strength."""
    denoising_steps: Positive = 50
    """Steps in which a sample image is drawn."""
    eval_freq: Positive = 100
    """Accepted for torchtitan's files, whose code does not read it either; `freq` decides."""
    save_img_count: AutoDegree = 1
    """Sample images a validation, of its first captions; -1: one for each of its captions, 0: none."""
    save_img_folder: str = "img"
    """Folder of the sample images, inside the dump folder."""
    all_timesteps: bool = False
    """Measure every image at all eight times, not at one of them in turn."""
    target_loss: PositiveFloat | None = None
    """Save and stop cleanly when the validation loss is at most this."""


@dataclass(frozen=True)
class Encoder:
    """Frozen encoders that serve a text-to-image model."""

    t5_encoder: str = "google/t5-v1_1-small"
    """T5: a folder or Hub repository; `embedded`: words to fixed random vectors, which needs no weights."""
    clip_encoder: str = "openai/clip-vit-large-patch14"
    """CLIP's text encoder, which gives one vector a text: a folder or Hub repository, or `embedded`."""
    autoencoder_path: str = "assets/hf/FLUX.1-dev/ae.safetensors"
    """Autoencoder: `ae.safetensors`, a folder of diffusers, or `embedded`: blocks of pixels themselves, no weights."""
    max_t5_encoding_len: Positive = 256
    """Text rows: longer captions are cut, shorter ones padded."""
    autoencoder_factor: Positive = 8
    """Pixels that a side of a latent covers."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype in which encoders compute; `auto`: bfloat16 on a GPU, float32 elsewhere."""


@dataclass(frozen=True)
class FlowMatching:
    """How rectified flows are trained (titan's own section)."""

    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the time t: uniform, or the logistic function of a normal number (Esser et al. 2024)."""
    logit_mean: float = 0.0
    """Mean of that number."""
    logit_std: PositiveFloat = 1.0
    """Deviation of that number."""
    resolution_shift: bool = False
    """Shift times towards noise by the number of image rows, as sampling does."""
    guidance: NonNegativeFloat = 1.0
    """What a model with distilled guidance is told of its strength."""
    dropout: Literal["independent", "joint"] = "independent"
    """Leave out T5's and CLIP's encoding of a caption each for itself, or both at once."""


@dataclass(frozen=True)
class Inference:
    """Defaults of `titan generate flux` for a run's checkpoints."""

    save_img_folder: str = "inference_results"
    """Folder of the images, inside the dump folder."""
    prompts_path: str = ""
    """File with prompts, one a line."""
    local_batch_size: Positive = 2
    """Images that a rank draws at once."""
    img_size: Positive | None = None
    """Pixels a side; unset: as in training."""


@dataclass(frozen=True)
class Data:
    """How text becomes batches (titan's own section)."""

    shuffle: bool = True
    """Read documents in an order drawn from the seed, another one every epoch."""
    num_workers: NonNegative = 0
    """Worker processes a rank; 0: one background thread."""
    prefetch: Positive = 4
    """Batches prepared ahead."""
    text_key: str = "text"
    """Column that holds the text."""
    image_key: str = "jpg"
    """Column, or ending of tar members, that holds images."""
    caption_key: str = "txt"
    """Column, or ending of tar members, that holds captions."""
    split: str = "train"
    """Split of a Hub data set."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    streaming: bool = False
    """Stream a Hub or local data set instead of preparing it for random access."""
    shuffle_window: Positive = 10000
    """Documents that are shuffled among each other when streaming."""
    split_documents: bool = True
    """Fill every row to the end and go on with the rest of a document in the next row; off: a document that fits in
    a row is never cut, and the row is padded."""


@dataclass(frozen=True)
class Guard:
    """What happens when a step goes wrong (titan's own section)."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """Loss or gradient norm is NaN or infinite: stop with a dump, skip the update and count it, or go back to the last
    checkpoint and past the data that broke it."""
    spike: Policy = "ignore"
    """The same for a loss spike."""
    spike_factor: PositiveFloat = 5.0
    """A loss is a spike when it exceeds the running mean by this many running deviations."""
    spike_window: Positive = 50
    """Steps of the running mean."""
    max_skips: NonNegative = 10
    """More skipped steps or rollbacks than this stop the run."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    guard: Guard = field(default_factory=Guard)
    validation: Validation = field(default_factory=Validation)
    encoder: Encoder = field(default_factory=Encoder)
    flow_matching: FlowMatching = field(default_factory=FlowMatching)
    inference: Inference = field(default_factory=Inference)
    experimental: Experimental = field(default_factory=Experimental)
