"""Repositories in the cache of Hugging Face's hub, laid out as huggingface_hub does it, and answers of the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants

from t5g2.checkpoint import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@contextmanager
def empty(folder: Path, *, offline: bool) -> Iterator[Path]:
    """Has huggingface_hub use an empty cache, as a new process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        forget()
        yield folder
    forget()


def forget() -> None:
    """Forgets what this process has resolved."""
    hub.COMMITS.clear()
    hub.snapshot.cache_clear()
    huggingface_hub.close_session()


def add(cache: Path, name: str, files: Path, *, commit: str = COMMIT, revision: str = "main") -> Path:
    """Adds a folder as a snapshot of a repository, of which the files are links to blobs; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return snapshot


class Hub(httpx2.BaseTransport):
    """The hub as an HTTP transport: answers by (method, path), every request of which is kept.

    Attributes:
      answers: (status, headers, content) of a method and a path; None = the connection fails.
      asked: (method, path) of each request.
    """

    def __init__(self, answers: dict[tuple[str, str], tuple[int, dict[str, str], bytes] | None]):
        self.answers, self.asked = answers, []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        key = request.method, request.url.path
        self.asked.append(key)
        answer = self.answers.get(key, (404, {"X-Error-Code": "RepoNotFound"}, b"{}"))
        if answer is None:
            raise httpx2.ConnectError("no route to host", request=request)
        status, headers, content = answer
        return httpx2.Response(status, headers=headers, content=content, request=request)
