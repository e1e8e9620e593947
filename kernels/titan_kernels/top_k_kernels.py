"""Triton kernel of `top_k.py`.

Bytes that must move, with e bytes a score: T*E*e read, 8*T*K written. A program holds the scores of a few tokens in
registers and finds the largest K times; what takes the time is these comparisons, not the bytes.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Swept on an H200 (torch 2.11, Triton 3.6) at 32768 tokens of 128 experts and 8192 of 256, K = 8, with the scores
# themselves where the keys are now: four tokens a warp 26 and 12 us, four tokens on four warps 27 and 17, sixteen on
# four 26 and 19; score and place packed into one int64, four tokens a warp, 28 and 13. Other widths are untuned.
TOKENS = 4
FEWEST, MOST = 512, 1024  # scores of a program of one warp

TAKEN = tl.constexpr(-(2**31))  # less than the key of every score
NAN = tl.constexpr(2**31 - 1)  # more


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Launch the choice of K of E."""
    num_tokens, num_experts = scores_TE.shape
    chosen = scores_TE.new_empty(num_tokens, k, dtype=torch.int64)
    if num_tokens:
        experts = triton.next_power_of_2(num_experts)
        tokens = max(1, FEWEST // experts, min(TOKENS, MOST // experts))
        _top_k[(triton.cdiv(num_tokens, tokens),)](
            scores_TE, chosen, num_tokens, num_experts,
            TOP_K=k, EXPERTS=experts, TOKENS=tokens, num_warps=max(1, experts // MOST),
        )  # fmt: skip
    return chosen


@triton.jit(do_not_specialize=["num_tokens"])
def _top_k(
    scores_ptr, chosen_ptr, num_tokens, num_experts, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    at = token.to(tl.int64)
    expert = tl.arange(0, EXPERTS)[None, :]
    mask = there[:, None] & (expert < num_experts)
    score = tl.load(scores_ptr + at[:, None] * num_experts + expert, mask=mask, other=0.0).to(tl.float32)
    # Integers in the order of the scores: with floats a NaN would win or lose by where it stands, and -inf could not be
    # told from what is taken, so that padding or an expert twice would be chosen
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    key = tl.where(mask, tl.where(score != score, NAN, key), TAKEN)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(key, 1)  # of equal keys the first
        tl.store(chosen_ptr + at * TOP_K + choice, best.to(tl.int64), mask=there)
        key = tl.where(expert == best[:, None], TAKEN, key)
