"""Objectives: what a model is asked about a piece of text. NumPy only."""

from t5g2.objectives.causal import Causal
from t5g2.objectives.prefix_lm import PrefixLM, PrefixLMDecoder
from t5g2.objectives.ul2 import T5GEMMA2, UL2, Denoiser

__all__ = ["BY_NAME", "T5GEMMA2", "UL2", "Causal", "Denoiser", "PrefixLM", "PrefixLMDecoder"]

BY_NAME = {"causal": Causal, "prefix_lm": PrefixLM, "prefix_lm_decoder": PrefixLMDecoder, "ul2": UL2}
