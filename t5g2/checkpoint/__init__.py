"""Weights on disk: train states, model folders, import and export of other formats, averages."""
