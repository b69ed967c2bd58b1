"""Evaluation: losses on held-out text, generation, and the tasks that a run is measured by."""
