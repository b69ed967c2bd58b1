"""Weights on disk: train states, model folders, averages."""
