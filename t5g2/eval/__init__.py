"""Evaluation: losses on held-out text, generation, and the evaluation tasks of a run."""
