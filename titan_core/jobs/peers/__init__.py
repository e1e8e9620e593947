"""Drivers of other trainers for `titan bench train`: each runs alone, in an environment of its own, without titan."""
