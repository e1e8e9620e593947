"""Devices, process groups, seeds, errors, events."""
