"""Tokenizer files in Gemma's layout, made here of this Python's text: SentencePiece's and the tokenizers library's."""

import io
import string
from pathlib import Path

NAMED = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
UNUSED = [f"<unused{k}>" for k in range(6)]
# behind the five: a place that is taken, as in Gemma 3, then <unused…>, turns, newlines as pieces of their own
OTHERS = ["[multimodal]", *UNUSED[:4], "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]


def sentences() -> list[str]:
    """Paragraphs of modules that every Python has."""
    text = "".join(Path(module.__file__).read_text() for module in (string, io))
    return [part.strip() for part in text.split("\n") if part.strip()]


def sentencepiece(folder: Path, pieces: int = 400) -> Path:
    """tokenizer.model: ids 0 to 3 as Gemma's, user-defined symbols from 4 on, bytes for what is unknown."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*NAMED[4:], *OTHERS, "<start_of_image>", "<end_of_image>", *UNUSED[4:]],
        **{f"{name}_id": at for at, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": NAMED[at] for at, name in enumerate(("pad", "eos", "bos", "unk"))},
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def siglip(folder: Path, pieces: int = 300) -> Path:
    """spiece.model: <pad>, </s> and <unk>, no BOS, a space in front of every text, as SigLIP has it."""
    import sentencepiece

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, vocab_size=pieces, minloglevel=2, **ids
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def huggingface(folder: Path, pieces: int = 400, *, t5gemma2: bool = False) -> Path:
    """tokenizer.json: the images' tokens after all pieces, and there the image token last of all, or, as in T5Gemma 2,
    <unused…> after it; with BOS, truncation and padding that must not show.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    made.train_from_iterator(
        sentences(),
        trainers.BpeTrainer(vocab_size=pieces, special_tokens=[*NAMED, *OTHERS, *bytes_], show_progress=False),
    )
    # bytes are ordinary pieces, which the trainer only takes as special ones
    made = _without_added(made, bytes_)
    last = ["<start_of_image>", "<end_of_image>", "<image_soft_token>", *(UNUSED[4:] if t5gemma2 else ())]
    made.add_special_tokens(last)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made = _with_special(made, [*NAMED[:4], "<start_of_turn>", "<end_of_turn>", *last[:3]])
    made.enable_truncation(5)
    made.enable_padding(length=40)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def _with_special(tokenizer, names):
    """Calls these added tokens special and no others, as Gemma's tokenizer.json does: not <mask> and not <unused…>."""
    import json

    import tokenizers

    node = json.loads(tokenizer.to_str())
    node["added_tokens"] = [token | {"special": token["content"] in names} for token in node["added_tokens"]]
    return tokenizers.Tokenizer.from_str(json.dumps(node))


def _without_added(tokenizer, names):
    import json

    import tokenizers

    node = json.loads(tokenizer.to_str())
    node["added_tokens"] = [token for token in node["added_tokens"] if token["content"] not in names]
    return tokenizers.Tokenizer.from_str(json.dumps(node))
