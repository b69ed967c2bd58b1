"""A list of images that are known to be valid, so that a source is opened again without decoding them."""

import hashlib
import os

import PIL

from t5g2.core.errors import UserError
from t5g2.core.files import cache_folder, replacing
from t5g2.core.logs import log
from t5g2.data import images

HASH_BYTES = 16  # the part of each hash that is kept


class ValidatedImages:
    """Hashes of a source's images that are known to be valid, kept in the cache folder.

    The hashes are those of file contents, so an image that has changed is decoded again, and one that has moved is not.
    A list holds for one version of Pillow.

    Args:
      path: path of the source; every source has a list of its own.
    """

    def __init__(self, path: str):
        name = hashlib.sha256(f"{os.path.abspath(path)} {PIL.__version__}".encode()).hexdigest()[:16]
        self._file = cache_folder() / f"{name}.images"
        data = self._file.read_bytes() if self._file.is_file() else b""
        self._known = {data[i : i + HASH_BYTES] for i in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES)}
        self._new: set[bytes] = set()

    def check(self, data: bytes, *, name: str) -> bytes:
        """Returns the hash, 32 bytes, of an image file's content; threads may call this concurrently.

        Raises:
          UserError: the content is not an image, or is damaged.
        """
        digest = hashlib.sha256(data).digest()
        if digest[:HASH_BYTES] not in self._known:
            images.read(data, name=name)
            self._new.add(digest[:HASH_BYTES])
        return digest

    def save(self) -> None:
        """Writes the list, or logs the reason if it cannot be written."""
        if not self._new:
            return
        try:
            with replacing(self._file) as part:
                part.write_bytes(b"".join(sorted(self._known | self._new)))
        # the second where something that is no folder is in the place of the cache
        except (OSError, UserError) as error:
            # only a warning: without the list, opening takes longer, and nothing else changes
            log.warning("the images will be decoded again when they are next opened: %s cannot be kept", error)
