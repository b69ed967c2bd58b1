"""A cache of tokens: token shards (token_shards.py) that the first run on a text writes to T5G2_CACHE or ~/.cache/t5g2.

tokens/<fingerprint of the text and of the tokenizer>/         a folder as `t5g2 tokenize` writes it
tokens/<fingerprint …>.lock                                    held by the process that writes it; others wait

A changed text or tokenizer has another folder, so nothing in the cache is ever out of date; old folders may be removed.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError
from t5g2.core.files import cache_folder, locked, make_folder
from t5g2.core.logs import log
from t5g2.data.shards import token_shards
from t5g2.data.shards.token_shards import Job, TokenDocuments, Tokens
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.base import Tokenizer

SHARD_DOCUMENTS = 4096


@dataclass(frozen=True)
class CachedText:
    """A source of text, read as tokens from the cache.

    Attributes:
      text: the source.
      max_skipped: the largest share of its records that may be left out; above it, nothing is tokenised.
      workers: number of processes that tokenise; 0 = this process.
    """

    text: Any
    tokenizer: Tokenizer
    max_skipped: float
    workers: int = 0

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents as tokens; as text if too many records were left out.

        Raises:
          UserError: as in the source's `open`.
        """
        documents = self.text.open(on_bad_record=on_bad_record)
        # the caller refuses such a source; its message needs the problems, which only the documents of text have
        if documents.skipped > self.max_skipped * (len(documents) + documents.skipped):
            return documents
        return cached_tokens(documents, self.tokenizer, workers=self.workers)

    def __str__(self) -> str:
        return str(self.text)


def cached_tokens(documents: Documents, tokenizer: Tokenizer, *, workers: int = 0) -> Documents:
    """Returns the same documents as tokens from the cache, to which they are written if they are missing.

    While one process writes them, others wait. After an interruption the next call continues after the last complete
    shard; a folder with a missing or damaged file is written again.

    Args:
      workers: number of processes that tokenise; 0 = this process.
    """
    if isinstance(documents, TokenDocuments):
        return documents
    # named by content: texts at two paths share their tokens, and a changed text gets another folder
    content = f"{documents.fingerprint} {tokenizer.fingerprint()}"
    folder, former = (_folder(name) for name in (f"{content} {token_shards.RECORD_TOKENS}", content))
    make_folder(folder.parent)
    # Folders of earlier versions have whole documents as records, which serve as well if none is long. Where special
    # tokens have spellings, earlier versions parsed them in the texts.
    if not tokenizer.parses_spellings and token_shards.FORMAT.is_finished(former):
        with locked(former.with_suffix(".lock")):
            tokens = _open_finished(former)
        if tokens is not None and tokens.longest <= token_shards.RECORD_TOKENS:
            return tokens
    with locked(folder.with_suffix(".lock")):
        tokens = _open_finished(folder)
        if tokens is None:
            job = Job(documents, tokenizer, {}, -(-len(documents) // SHARD_DOCUMENTS))
            manifest = token_shards.write(job, folder, workers=max(workers, 1))
            log.info("tokens of %s: %d, kept in %s", documents.fingerprint, manifest["tokens"], folder)
            tokens = Tokens(str(folder)).open()
    return tokens


def _folder(name: str) -> Path:
    return cache_folder() / "tokens" / hashlib.sha256(name.encode()).hexdigest()[:16]


def _open_finished(folder: Path) -> TokenDocuments | None:
    """Returns the documents of a folder; None if it is unfinished, or removed because a file is missing or damaged."""
    if not token_shards.FORMAT.is_finished(folder):
        return None
    try:
        return Tokens(str(folder)).open()
    except UserError as error:
        log.warning("%s", error)
        # safe, because the caller holds the lock
        shutil.rmtree(folder)
        return None
