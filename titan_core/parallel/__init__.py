"""One engine that lays models over a mesh."""
