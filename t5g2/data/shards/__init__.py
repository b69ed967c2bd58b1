"""Shards of tokens and of teacher logits: ArrayRecord files with a manifest, written before a run."""
