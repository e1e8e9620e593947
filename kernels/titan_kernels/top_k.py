"""The largest scores of each token: how a router chooses experts, and groups of them (Shazeer et al. 2017, eq. 5).

Shapes: T tokens, E experts (or groups) to choose from, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton

WIDEST = 32768  # scores of a token: a program holds all, 1024 a warp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return where the `k` largest of the last dimension are, int64, the largest first and of equal ones the first.

    As in `torch.topk`, NaN is larger than everything. torch's kernels leave open which of equal ones they find, and may
    find others where the number of tokens is another. No gradient: gather the scores at what is returned.
    """
    if scores.dim() < 1 or scores.dtype not in DTYPES:
        raise ValueError(
            f"top_k() takes float32, bfloat16 or float16 scores of one or more dimensions; got {scores.dtype} of shape "
            f"{tuple(scores.shape)}"
        )
    width = scores.shape[-1]
    if not 1 <= k <= width <= WIDEST:
        raise ValueError(f"top_k() chooses 1 or more of at most {WIDEST} scores; got k = {k} and {width} scores")
    chosen_TK = torch.ops.titan_kernels.top_k(scores.detach().reshape(-1, width), k)
    return chosen_TK.view(*scores.shape[:-1], k)


def reference_top_k(scores: Tensor, k: int) -> Tensor:
    """`top_k` in plain torch: a stable sort, as `torch.topk` promises nothing of equal scores."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@torch.library.custom_op("titan_kernels::top_k", mutates_args=())
def _top_k(scores_TE: Tensor, k: int) -> Tensor:
    if runs_triton(scores_TE):
        from titan_kernels import top_k_kernels

        return top_k_kernels.top_k(scores_TE.contiguous(), k)
    return reference_top_k(scores_TE, k).contiguous()


@_top_k.register_fake
def _(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], k, dtype=torch.int64)
