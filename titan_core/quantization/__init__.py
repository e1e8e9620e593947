"""Low-precision matmuls."""
