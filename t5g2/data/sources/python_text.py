"""The standard library of this Python as text: nothing to download."""

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typing_extensions import override

from t5g2.core.bounds import Bounds, CountOrZero, checked
from t5g2.core.errors import UserError
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.validation import fingerprint


@dataclass(frozen=True)
@checked
class PythonText:
    """English and code that ship with every Python: the language reference and the standard library.

    Documents are the topics of the language reference (`pydoc_data.topics`) and the top-level modules of the standard
    library, docstrings included, each one document, in the order of their names. Packages, tests and site-packages are
    left out. The split of a document depends only on its name, so it is the same in every version of Python.

    Attributes:
      split: "train", "heldout" or "all".
      heldout_percent: approximate share of documents that are held out, in percent.
      max_bytes: maximum size of all documents of all splits; documents are added in the order of their names' hashes
        until the next one would exceed it. 0 = no maximum.
    """

    split: Literal["train", "heldout", "all"] = "train"
    heldout_percent: Annotated[int, Bounds(least=1, most=99)] = 10
    max_bytes: CountOrZero = 0

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents of this split; there are no bad records.

        Raises:
          UserError: this Python is installed without the sources of its library.
        """
        texts = _python_texts()
        chosen, size = [], 0
        # in the order of hashes, so that max_bytes takes a sample of all names and not the alphabetically first
        for name in sorted(texts, key=_name_hash):
            size += len(texts[name].encode())
            if self.max_bytes and size > self.max_bytes:
                break
            if self.split == "all" or (_name_hash(name) % 100 < self.heldout_percent) == (self.split == "heldout"):
                chosen.append(name)
        if not chosen:
            raise UserError(
                f"no document of the standard library is in split {self.split!r} with max_bytes = {self.max_bytes} and "
                f"heldout_percent = {self.heldout_percent}; raise them"
            )
        return _Texts(self, tuple(texts[name] for name in sorted(chosen)))


@dataclass(frozen=True, eq=False)
class _Texts(Documents):
    source: PythonText
    texts: tuple[str, ...]

    def __reduce__(self):
        # workers read the library themselves; the texts are megabytes
        return PythonText.open, (self.source,)

    @property
    @override
    def skipped(self) -> int:
        return 0

    @property
    @override
    def characters(self) -> int:
        return sum(map(len, self.texts))

    @property
    @override
    def fingerprint(self) -> str:
        return fingerprint(text.encode() for text in self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


def _python_texts() -> dict[str, str]:
    """Returns {name: text} of the language reference's topics and of the standard library's top-level modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()}
    # some installations of Python leave these topics out
    try:
        from pydoc_data import topics

        reference = topics.topics
    except ImportError:
        reference = {}
    if not texts or not reference:
        raise UserError(
            f"this Python has {len(texts)} modules of its library as sources in {folder} and {len(reference)} topics "
            f"in pydoc_data; use one that was installed with both, or another source of text"
        )
    return texts | {f"topic {name}": text for name, text in reference.items()}


def _name_hash(name: str) -> int:
    """Returns a number that depends on the name alone, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
