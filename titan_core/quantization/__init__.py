"""Low-precision matmuls: float8 and MXFP8, for the linear layers where they pay."""

from titan_core.quantization.convert import convert, precompute_scales, wires

__all__ = ["convert", "precompute_scales", "wires"]
