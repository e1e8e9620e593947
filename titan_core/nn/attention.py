"""Scaled dot-product attention behind one function, causal or causal within documents.

Shape letters: B batch, T tokens, S keys, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.nn.cpu_attention import causal_attention
from titan_core.nn.planning import device_type, planning


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees besides causality, in the form that the device computes with; not `causal`: every key.

    `dense` is a boolean (B, 1, T, S) for SDPA, `blocks` a flex BlockMask, `documents` (B, S) the numbers of which both
    were made. With none of them, attention is plain causal.
    """

    dense: Tensor | None = None
    blocks: Any = None
    documents: Tensor | None = None
    causal: bool = True


CAUSAL, FULL = Mask(), Mask(causal=False)


def document_mask(documents_BS: Tensor, queries_T: Tensor) -> Mask:
    """Build the mask that lets a token see earlier tokens of its own document only.

    `documents_BS` holds document numbers, -1 for padding; `queries_T` the positions of the queries among the S tokens.
    On a GPU it is a flex block mask, which skips whole blocks; elsewhere, where flex attention has no backward, a
    boolean tensor.
    """
    if planning() and device_type(documents_BS) == "cuda":
        return CAUSAL  # flex attention keeps what causal attention keeps, but for its small block mask
    if documents_BS.device.type == "cuda":
        return Mask(blocks=_block_mask(documents_BS, queries_T), documents=documents_BS)
    keys_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    return Mask(dense=visible(documents_BS, queries_T, keys_S)[:, None], documents=documents_BS)


def visible(documents_BS: Tensor, queries_T: Tensor, keys_K: Tensor) -> Tensor:
    """Return which keys each query sees, by the positions of both in their rows: boolean (B, T, K)."""
    same = documents_BS[:, queries_T, None] == documents_BS[:, None, keys_K]
    return same & (queries_T[:, None] >= keys_K)


def chunk_mask(mask: Mask, chunk: int, positions_T: Tensor, keys: int) -> Mask:
    """Narrow a mask so that a token sees its own chunk of `chunk` tokens only: a chunk is a document.

    `positions_T` are the positions of the tokens at hand, `keys` how many there are so far; a mask that knows documents
    knows the number of keys itself, and for which queries it was made: those at hand, or all.
    """
    if mask.documents is None and keys <= chunk:
        return mask
    documents_BS = torch.zeros(1, keys, dtype=torch.long, device=positions_T.device)
    if mask.documents is not None:
        documents_BS = mask.documents.to(positions_T.device)
    chunks_S = torch.arange(documents_BS.shape[1], device=positions_T.device) // chunk
    if mask.dense is None and mask.blocks is None:
        queries_T = positions_T
    else:
        made_for = mask.blocks.shape[-2] if mask.dense is None else mask.dense.shape[2]
        queries_T = (
            positions_T if made_for == positions_T.shape[0] else torch.arange(made_for, device=positions_T.device)
        )
    apart_BS = (documents_BS * (documents_BS.shape[1] // chunk + 1) + chunks_S).where(documents_BS >= 0, -1)
    if (
        mask.documents is None and keys != queries_T.shape[0]
    ):  # decoding: a block mask would be compiled for each length
        return Mask(dense=visible(apart_BS, queries_T, torch.arange(keys, device=queries_T.device))[:, None])
    return document_mask(apart_BS, queries_T)


class Attention(nn.Module):
    """`attention` as a module without weights: a place in a model that engines can find by its name."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, mask: Mask) -> Tensor:
        """Return (B, T, H, C)."""
        return attention(q_BTHC, k_BSKC, v_BSKC, mask, self.scale)


def attention(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """Return softmax(q k^T scale) v as (B, T, H, C); query heads share key/value heads without copying them.

    Queries are the last T of the S positions. The values may be wider or narrower than the keys. `scale` is
    1 / sqrt(C) if it is not given.
    """
    if not mask.causal:
        return full_attention(q_BTHC, k_BSKC, v_BSKC)
    if _trains_on_cpu(q_BTHC, k_BSKC, mask):
        return causal_attention(q_BTHC, k_BSKC, v_BSKC, scale)
    width = v_BSKC.shape[-1]
    if planning() and width < k_BSKC.shape[-1]:  # a GPU's fused kernels take two widths, the CPU's takes one
        wide = F.pad(v_BSKC, (0, k_BSKC.shape[-1] - width))
        return attention(q_BTHC, k_BSKC, wide, mask, scale)[..., :width]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    how: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if mask.blocks is not None:
        out = _compiled_flex()(q, k, v, block_mask=mask.blocks, **how)
    elif mask.dense is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, **how)
    elif 1 < q.shape[2] < k.shape[2] and not planning():  # a plan counts what flash attention keeps, without a mask
        seen = _last_rows(q.shape[2], k.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **how)
    elif q.shape[2] > 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
    else:  # a single query, the newest, sees every key
        out = F.scaled_dot_product_attention(q, k, v, **how)
    return out.transpose(1, 2)


def full_attention(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v as (B, T, H, C), where every query sees every key."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _trains_on_cpu(q_BTHC: Tensor, k_BSKC: Tensor, mask: Mask) -> bool:
    """Is this plain causal attention with a backward to come, on a CPU, and not being compiled?"""
    plain = mask.dense is None and mask.blocks is None and q_BTHC.shape[1] == k_BSKC.shape[1]
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return plain and eager and device_type(q_BTHC) == "cpu"


def _last_rows(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return which of the keys each of the last `queries` positions sees: (T, S), or on a GPU a name for it."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # and the compiler with it: 0.7 s

        return causal_lower_right(queries, keys)  # flash attention knows this mask without seeing it
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _block_mask(documents_BS: Tensor, queries_T: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        position = queries_T[q]
        return (position >= kv) & (documents_BS[b, position] == documents_BS[b, kv])

    batch, num_keys = documents_BS.shape
    return create_block_mask(sees, batch, None, queries_T.shape[0], num_keys, device=documents_BS.device, _compile=True)


def _compiled_flex() -> Any:
    """Return flex attention, compiled: eager, it materialises the scores. torch caches the compiled code."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
