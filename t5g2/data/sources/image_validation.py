"""Images that have been decoded once, by what their files hold: a source is opened again without decoding them."""

import contextlib
import hashlib
import logging
import os

import PIL

from t5g2.core import files
from t5g2.data import images

log = logging.getLogger(__name__)

BYTES = 16  # of a hash, that are kept


class ValidatedImages:
    """The hashes of the images of a source that are known to be sound, kept in the cache (copies.py).

    They are of the files' contents, so an image that has changed is decoded anew, wherever it stands; and of one
    version of Pillow.

    Args:
      where: the source's path; each has a file of its own.
    """

    def __init__(self, where: str):
        name = hashlib.sha256(f"{os.path.abspath(where)} {PIL.__version__}".encode()).hexdigest()[:16]
        self._file = files.cache_folder() / f"{name}.images"
        data = self._file.read_bytes() if self._file.is_file() else b""
        self._known = {data[i : i + BYTES] for i in range(0, len(data) - BYTES + 1, BYTES)}
        self._new: set[bytes] = set()

    def check(self, data: bytes, *, name: str) -> bytes:
        """The hash, 32 bytes, of what an image's file holds; several threads may ask at a time.

        Raises:
          UserError: it is no image, or damaged.
        """
        digest = hashlib.sha256(data).digest()
        if digest[:BYTES] not in self._known:
            images.read(data, name=name)
            self._new.add(digest[:BYTES])
        return digest

    def save(self) -> None:
        """Writes down what has been found sound, or says why it cannot."""
        if not self._new:
            return
        part = self._file.with_name(f".{self._file.name}.{os.urandom(4).hex()}.part")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(b"".join(sorted(self._known | self._new)))
            os.replace(part, self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            log.warning("the images will be decoded again when they are next opened: %s cannot be kept", error)
