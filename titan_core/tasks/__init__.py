"""What one step computes."""
