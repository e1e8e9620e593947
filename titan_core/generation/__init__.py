"""Decoding with caches and samplers."""
