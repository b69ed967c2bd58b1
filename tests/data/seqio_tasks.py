"""Tasks and a mixture that seqio knows once this is imported; their vocabulary is in T5G2_TEST_VOCABULARY."""

import functools
import os

import seqio
import tensorflow as tf

VOCABULARY = seqio.SentencePieceVocabulary(os.environ["T5G2_TEST_VOCABULARY"])


def _pairs(name, split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    texts = {
        "inputs": [f"{name} question {i}: " + "why? " * i for i in range(5)],
        "targets": [f"{i}" for i in range(5)],
    }
    return tf.data.Dataset.from_tensor_slices(texts)


def _documents(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"targets": [f"a document, the {i}th of them\n" * 3 for i in range(4)]})


def _with_an_empty_one(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"targets": ["a text of some length"] * 3 + [""]})


def _add(name, function, features, *, eos=True, preprocessors=(seqio.preprocessors.tokenize,)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(function, splits=["train"]),
        preprocessors=[*preprocessors, *([seqio.preprocessors.append_eos_after_trim] if eos else [])],
        output_features={feature: seqio.Feature(VOCABULARY, add_eos=True) for feature in features},
    )


for task in ("plain", "other"):
    _add(f"{task}_pairs", functools.partial(_pairs, task), ("inputs", "targets"))
_add("documents", _documents, ("targets",))
_add("with_an_empty_one", _with_an_empty_one, ("targets",), eos=False)
_add("text", _documents, ("targets",), eos=False, preprocessors=())
_add("text_pairs", functools.partial(_pairs, "a"), ("inputs", "targets"), eos=False, preprocessors=())
seqio.MixtureRegistry.add("mixed_pairs", [("plain_pairs", 1), ("other_pairs", 3)])
