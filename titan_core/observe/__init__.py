"""Metrics, loggers, profiler, memory."""
