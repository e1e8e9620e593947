"""The schema, loading, checks and recipes. No torch."""
