"""FLOPs, memory and time, in plain Python."""
