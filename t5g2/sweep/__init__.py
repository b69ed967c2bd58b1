"""A sweep: several runs and the commands between them, with one report at the end; a sweep file imports from here."""

from t5g2.sweep.grid import grid
from t5g2.sweep.paper import Paper
from t5g2.sweep.parts import Step, Sweep, Variant

__all__ = ["Paper", "Step", "Sweep", "Variant", "grid"]
