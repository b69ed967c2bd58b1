"""Seeds derived from one seed by name, never by the order in which code runs."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """Returns a seed below 2^32 for one purpose, which the names identify."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "little")
