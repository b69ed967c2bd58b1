"""Tokenizers: bytes, SentencePiece, tokenizer.json."""
