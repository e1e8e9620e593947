"""Cross-entropy of a linear head: loss, and loss with gradients of the hidden states and the weight.

Shape letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Absent, Call, Case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.passes import Operands
from titan_core.jobs.bench.request import Request

# (rows, width, vocabulary): Llama 3 8B twice, Qwen3 0.6B
SHAPES = ((2048, 4096, 128256), (8192, 4096, 128256), (8192, 1024, 151936))
REDUCED = ((250, 96, 4001),)
# Logits are rounded to bf16, and so are their gradients: of eighteen draws on a CPU the worst row was off by 1.0e-2
LIMIT = 3e-2
_PIECE = 1 << 27  # logits in fp64 at once, for the truth: 1 GiB

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Size:
    rows: int
    width: int
    vocabulary: int


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give the loss alone, and with its gradients."""
    for numbers in REDUCED if request.reduced else SHAPES:
        for part in ("fwd", "fwd+bwd"):
            yield _case(_Size(*numbers), part, draw)


def _case(size: _Size, part: str, draw: Draw) -> Case:
    products, passed = (1, 1) if part == "fwd" else (3, 2)  # what is read has its gradient written
    return Case(
        operation="fused-ce",
        shape=f"{size.rows}x{size.width} V={size.vocabulary}",
        part=part,
        dtype="bf16",
        flops=2.0 * products * size.rows * size.width * size.vocabulary,
        moved=2.0 * passed * (size.rows + size.vocabulary) * size.width,
        inputs=lambda: _operands(size, draw),
        reference=lambda operands: _truth(operands, part),
        backends={name: _prepare(find, part) for name, find in _BACKENDS.items()},
        limit=LIMIT,
    )


def _operands(size: _Size, draw: Draw) -> Operands:
    hidden = draw.normal(size.rows, size.width)
    weight = draw.normal(size.vocabulary, size.width, scale=size.width**-0.5)
    labels = draw.integers(size.vocabulary, size.rows)
    labels[:: max(1, size.rows // 16)] = -100
    return Operands([hidden, weight], [labels], torch.ones((), device=draw.device))


def _truth(operands: Operands, part: str) -> Sequence[Tensor]:
    """Compute the sum of the losses and its gradients in fp64, some rows at a time."""
    (hidden, weight), (labels,) = operands.tensors, operands.fixed
    wide = weight.double()
    total = hidden.new_zeros((), dtype=torch.float64)
    grad_hidden, grad_weight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    step = max(1, _PIECE // weight.shape[0])
    for rows in (slice(start, start + step) for start in range(0, hidden.shape[0], step)):
        logits = hidden[rows].double() @ wide.T
        total += F.cross_entropy(logits, labels[rows], reduction="sum")
        slope = logits.softmax(-1)
        valid = labels[rows] != -100
        slope[torch.arange(slope.shape[0], device=slope.device), labels[rows].clamp_min(0)] -= 1
        slope *= valid[:, None]
        grad_hidden[rows] = slope @ wide
        grad_weight.addmm_(slope.T, hidden[rows].double())
    return [total] if part == "fwd" else [total, grad_hidden, grad_weight]


def _prepare(find: Callable[[], Loss], part: str) -> Callable[[Operands], Call]:
    return lambda operands: passes.of(part, find())(operands)


def _titan() -> Loss:
    from titan_kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _training() -> Loss:
    """What training computes with unless it compiles."""
    from titan_core.nn.loss import linear_cross_entropy

    return linear_cross_entropy


def _compiled_training() -> Loss:
    """What training computes with where it compiles the loss: its chunks, and a compiled kernel for each."""
    from titan_core.nn.loss import linear_cross_entropy, loss_and_slope

    inner = passes.compiled(loss_and_slope)
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, inner)


def _eager(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), labels_N, reduction="sum")


def _torch() -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent("torch 2.13 and later have it")
    return lambda hidden, weight, labels: function(hidden, weight, labels, reduction="sum").float()


def _liger() -> Loss:
    if not torch.cuda.is_available():
        raise Absent("Liger needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise Absent("pip install liger-kernel") from None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


_BACKENDS: dict[str, Callable[[], Loss]] = {
    OWN: _titan,
    "training": _training,
    "training-compiled": _compiled_training,
    "eager": lambda: _eager,
    "compile": lambda: passes.compiled(_eager),
    "torch": _torch,
    "liger": _liger,
}
