"""Foundations: leaf paths, sharding, the batch contract, settings, errors, files, logs."""
