"""Implementations of attention, one per file, all with the signature of `reference.attend`; `choice` picks one."""
