"""A sweep: several runs and the commands between them, with one report at the end; a sweep file imports from here."""

from t5g2.sweep.parts import Paper, Step, Sweep, Variant

__all__ = ["Paper", "Step", "Sweep", "Variant"]
