"""Text as batches, with a position that outlives the ranks."""
