"""Token shards and teacher-logit shards: ArrayRecord files with a manifest, made ahead of a run."""
