"""Training objectives: functions from a chunk of text to an example. NumPy only."""

from t5g2.objectives.causal import Causal
from t5g2.objectives.denoisers import T5, T5GEMMA2, UL2_ORIGINAL, Denoiser
from t5g2.objectives.multimodal import MultimodalPrefixLM, MultimodalPrefixLMDecoder
from t5g2.objectives.prefix_lm import PrefixLM, PrefixLMDecoder
from t5g2.objectives.probe import Probe, ProbeDecoder
from t5g2.objectives.seq2seq import Seq2Seq
from t5g2.objectives.sft import SupervisedFineTuning, SupervisedFineTuningDecoder
from t5g2.objectives.ul2 import UL2, SpanCorruption, UL2Original

__all__ = [
    "BY_NAME",
    "T5",
    "T5GEMMA2",
    "UL2",
    "UL2_ORIGINAL",
    "Causal",
    "Denoiser",
    "MultimodalPrefixLM",
    "MultimodalPrefixLMDecoder",
    "PrefixLM",
    "PrefixLMDecoder",
    "Probe",
    "ProbeDecoder",
    "Seq2Seq",
    "SpanCorruption",
    "SupervisedFineTuning",
    "SupervisedFineTuningDecoder",
    "UL2Original",
]

BY_NAME = {
    "causal": Causal,
    "multimodal_prefix_lm": MultimodalPrefixLM,
    "multimodal_prefix_lm_decoder": MultimodalPrefixLMDecoder,
    "prefix_lm": PrefixLM,
    "prefix_lm_decoder": PrefixLMDecoder,
    "probe": Probe,
    "probe_decoder": ProbeDecoder,
    "seq2seq": Seq2Seq,
    "sft": SupervisedFineTuning,
    "sft_decoder": SupervisedFineTuningDecoder,
    "span_corruption": SpanCorruption,
    "ul2": UL2,
    "ul2_original": UL2Original,
    # former names, for older configs; the first name of a class is the one that is written
    "answers": SupervisedFineTuning,
    "answers_decoder": SupervisedFineTuningDecoder,
}
