"""The pretrained Gemma 3 270M, ours and transformers' on the same text. Runs only where REAL names its folder.

make real REAL=DIR
"""

import os
from pathlib import Path

import numpy as np
import pytest

import t5g2
from t5g2.checkpoint import export_folder, import_folder
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers import registry
from t5g2.jobs import verification_cases
from t5g2.jobs.imported_model import model_outputs
from t5g2.jobs.reference_model import reference_outputs
from t5g2.train import adaptation
from t5g2.train.weight_origin import Adapt

REAL = os.environ.get("REAL")
pytestmark = pytest.mark.skipif(not REAL, reason="REAL names no folder with gemma-3-270m: make real REAL=DIR")
SOURCE = Path(REAL or "") / "gemma-3-270m"
PROMPTS, NEW_TOKENS = 20, 16


@pytest.fixture(scope="module")
def passages():
    """Beginnings of documents, of prose and code, each of some 40 words."""
    documents = PythonText(split="all").open()
    texts = [" ".join(documents[number].split()[:40]) for number in range(len(documents))]
    return [text for text in texts if len(text) > 100]


@pytest.mark.long
def test_logits_of_the_imported_model_are_those_of_transformers(tmp_path, passages):
    """On 512 tokens of text, within 1e-4 of the largest logit."""
    folder = import_folder.import_model(SOURCE, tmp_path / "imported")
    tokens = registry.from_dict(folder.tokenizer, folder.path).encode("\n".join(passages))[:512]
    [case] = [c for c in verification_cases.draw_cases(folder.config, tokens) if c.name == "512 tokens of text"]
    [theirs] = reference_outputs(SOURCE, folder.config, [case])
    [ours] = model_outputs(folder.path, [case])[0].values()
    assert ours.logits.shape == (512, 262_144)
    error, largest = np.abs(ours.logits - theirs.logits).max(), np.abs(theirs.logits).max()
    print(f"largest difference {error:.2e}, largest logit {largest:.1f}: {error / largest:.1e}")
    assert error <= 1e-4 * largest
    assert ours.tokens == theirs.tokens


@pytest.mark.long
def test_the_exported_adapted_model_writes_in_transformers_what_it_writes_here(tmp_path, passages):
    """The same greedy continuation of 20 prompts; nothing is missing when transformers loads it."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    adaptation.adapt_folder(Adapt(str(SOURCE)), "t5gemma2", tmp_path / "adapted")
    export_folder.export_model(tmp_path / "adapted", tmp_path / "exported")
    prompts = passages[:PROMPTS]
    assert len(prompts) == PROMPTS

    model, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer, expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported"), []
    for prompt in prompts:
        with torch.no_grad():
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append([token for token in output[0, 1:].tolist() if token != tokenizer.eos_token_id])
    del model

    outputs = t5g2.load(tmp_path / "adapted", dtype="float32").outputs(prompts, max_new_tokens=NEW_TOKENS)
    same = sum(output.tokens.tolist() == tokens for output, tokens in zip(outputs, expected, strict=True))
    print(f"{same} of {PROMPTS} continuations are the same")
    assert same == PROMPTS
