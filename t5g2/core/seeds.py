"""Seeds derived from one seed by name, never by the order in which code runs."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed below 2^32 for the purpose that the names say."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "little")
