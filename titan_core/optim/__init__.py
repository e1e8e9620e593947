"""Optimizers, groups, schedules."""
