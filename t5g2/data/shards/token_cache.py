"""Tokens that a run makes once: the shards of t5g2/data/shards/token_shards.py, kept in T5G2_CACHE or ~/.cache/t5g2.

tokens/<fingerprint of the text and of the tokenizer>/         a folder as `t5g2 tokenize` writes it
tokens/<fingerprint …>.lock                                    held by the process that writes it; others wait

A text or a tokenizer that changes has another name, so nothing here is ever out of date; what is old may be removed.
"""

import fcntl
import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError
from t5g2.core.files import cache_folder
from t5g2.data.shards import token_shards
from t5g2.data.shards.token_shards import Job, TokenDocuments, Tokens
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

SHARD_DOCUMENTS = 4096


@dataclass(frozen=True)
class CachedText:
    """A source of text, read as tokens from the cache.

    Attributes:
      text: where the text comes from.
      max_skipped: the largest share of its records that may be left out; more of it is not tokenised.
      workers: processes that tokenise; 0 = this one.
    """

    text: Any
    tokenizer: Tokenizer
    max_skipped: float
    workers: int = 0

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Its documents, as they are if too many are left out, else as tokens.

        Raises:
          UserError: as the text.
        """
        documents = self.text.open(on_bad_record=on_bad_record)
        if documents.skipped > self.max_skipped * (len(documents) + documents.skipped):
            return documents
        return cached_tokens(documents, self.tokenizer, workers=self.workers)

    def __str__(self) -> str:
        return str(self.text)


def cached_tokens(documents: Documents, tokenizer: Tokenizer, *, workers: int = 0) -> Documents:
    """The same documents as tokens from the cache, which are made if they are not there.

    Whoever comes while they are made waits. Interrupted, the next call goes on after the last whole shard; a folder
    that has lost something is made anew.

    Args:
      workers: processes that make them; 0 = this one.
    """
    if isinstance(documents, TokenDocuments):
        return documents
    name = hashlib.sha256(f"{documents.fingerprint} {tokenizer.fingerprint()}".encode()).hexdigest()[:16]
    folder = cache_folder() / "tokens" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _whole(folder)
        if found is None:
            job = Job(documents, tokenizer, {}, -(-len(documents) // SHARD_DOCUMENTS))
            said = token_shards.write(job, folder, workers=max(workers, 1))
            log.info("tokens of %s: %d, kept in %s", documents.fingerprint, said["tokens"], folder)
            found = Tokens(str(folder)).open()
    return found


def _whole(folder: Path) -> Documents | None:
    """What a folder holds; None if it is not finished, or has lost something and is made anew."""
    if not (folder / token_shards.MANIFEST).is_file():
        return None
    try:
        return Tokens(str(folder)).open()
    except UserError as error:
        log.warning("%s", error)
        shutil.rmtree(folder)
        return None
