"""Models of Hugging Face's hub, by their addresses: hf://OWNER/NAME[@REVISION][/PATH].

huggingface_hub downloads, keeps and uploads them: its cache, its token, its offline mode (HF_HUB_OFFLINE=1). A revision
is resolved to a commit once in a process, so that all that it reads of a model is of one commit.
"""

import functools
import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from t5g2.checkpoint import flax_tree, safetensors_io
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core.errors import MachineError, UserError
from t5g2.core.optional import require

SCHEME = "hf://"
SITE = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
PINNED = re.compile(rf"{SCHEME}[^@]+@{COMMIT.pattern}(/.*)?")
# a repository may also have weights of other formats, pictures and logs, none of which is downloaded
WANTED = (
    "*.safetensors",
    safetensors_io.INDEX,
    CONFIG_FILE,
    "adapter_config.json",
    folders.MODEL,
    folders.TOKENIZER,
    folders.PROVENANCE,
    *folders.EXTRA_FILES,
)
# address -> the same with its commit, as this process has resolved it, or the run that it goes on with
COMMITS: dict[str, str] = {}
# weights of a former upload, which would lie beside the new ones
REPLACED = (safetensors_io.SINGLE, "model-*-of-*.safetensors", safetensors_io.INDEX)


class Address(NamedTuple):
    """Parts of an address.

    Attributes:
      repository: OWNER/NAME.
      revision: a branch, a tag or a commit; None = the main branch.
      path: a GGUF file or a folder in the repository; "" = its top.
    """

    repository: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}{self.repository}{revision}{self.path and '/' + self.path}"


def is_address(source: str | PathLike) -> bool:
    """True for a model of the hub, and not of this machine."""
    return isinstance(source, str) and source.startswith(SCHEME)


def parse(text: str) -> Address:
    """Returns the parts of an address.

    Raises:
      UserError: huggingface_hub is not installed; the text is not the address of a model.
    """
    library, errors = _library(text), _errors(text)
    try:
        uri = library.parse_hf_uri(text)
        require("huggingface_hub.utils", "hub").validate_repo_id(uri.id)
    except (errors.HfUriError, errors.HFValidationError) as error:
        raise UserError(f"{text} is no address of a model ({_line(error)}); write hf://OWNER/NAME[@REVISION]") from None
    if uri.type != "model":
        raise UserError(f"{text} is a {uri.type} and not a model; write hf://OWNER/NAME[@REVISION]")
    return Address(uri.id, uri.revision, uri.path_in_repo)


def pinned(text: str) -> str:
    """Returns an address with the commit that its revision stands for now, or stood for when the hub was last reached.

    Raises:
      UserError: as parse; there is no such repository or revision; the hub cannot be reached, and the cache has none.
    """
    if PINNED.fullmatch(text):  # before the library is asked for: records are read without it
        return text
    if text not in COMMITS:
        address = parse(text)
        with _explained(address, "read"):
            revision = _library(text).HfApi().resolve_revision(address.repository, revision=address.revision)
        COMMITS[text] = str(address._replace(revision=revision.resolved))
    return COMMITS[text]


@functools.cache
def snapshot(text: str) -> Path:
    """Returns the folder of an address in the hub's cache, or its GGUF file; what is missing of it is downloaded.

    Of a folder, the files of a model at its top are downloaded; if it has no safetensors, the Orbax checkpoint in it.

    Raises:
      UserError: as pinned; the repository is gated; it has no such file or folder, or no weights in it.
      MachineError: the hub has a failure.
    """
    address = parse(pinned(text))
    prefix = glob.escape(address.path) + "/" if address.path else ""
    if address.path.lower().endswith(".gguf"):
        file = _download(address, [glob.escape(address.path)]) / address.path
        if not file.is_file():
            listed = _listed(address)
            if listed is None or address.path in listed:
                raise _not_cached(text, address, "this file", listed)
            raise UserError(f"{text}: there is no such file in the repository{_gguf_note(address)}")
        return file
    folder = _download(address, [prefix + name for name in WANTED], ignored=f"{prefix}*/*") / address.path
    if not any(folder.glob("*.safetensors")):
        # below the top too: a download of a Flax model has its checkpoint in a folder of its own
        _download(address, [f"{prefix}*{flax_tree.METADATA}"])
        roots = [mark.parent.relative_to(folder) for mark in folder.rglob(flax_tree.METADATA)]
        if not roots:
            listed = _listed(address)
            inside, weights = f"{address.path}/" if address.path else "", (".safetensors", flax_tree.METADATA)
            if listed is None or any(name.startswith(inside) and name.endswith(weights) for name in listed):
                raise _not_cached(text, address, "its weights", listed)
            raise UserError(
                f"{text} has no weights in a format that is read: neither safetensors nor an Orbax checkpoint"
                f"{_gguf_note(address) or '; give another repository, or hf://OWNER/NAME/FOLDER'}"
            )
        below = [prefix + ("" if root == Path() else f"{glob.escape(root.as_posix())}/") for root in roots]
        _download(address, [f"{start}*" for start in below])
    return folder


def recorded(path: str | PathLike) -> str:
    """Returns the address, with its commit, of a path in the hub's cache; of any other path the path itself.

    …/models--google--gemma-3-270m/snapshots/9b0c… is hf://google/gemma-3-270m@9b0c….
    """
    parts = Path(path).parts
    for place, (model, snapshots, commit) in enumerate(zip(parts, parts[1:], parts[2:], strict=False)):
        if snapshots == "snapshots" and COMMIT.fullmatch(commit) and model.count("--") == 2:
            kind, owner, name = model.split("--")
            if kind == "models":
                return str(Address(f"{owner}/{name}", commit, "/".join(parts[place + 3 :])))
    return str(path)


def create_repository(text: str) -> None:
    """Creates the repository of an address, and its branch, where they are missing.

    Raises:
      UserError: as parse; the address has a path or a commit; this user may not write there; the hub cannot be reached.
      MachineError: the hub has a failure.
    """
    address = parse(text)
    if address.path or (address.revision is not None and COMMIT.fullmatch(address.revision)):
        raise UserError(f"{text} has a {'path' if address.path else 'commit'}; push to hf://OWNER/NAME[@BRANCH]")
    api = _library(text).HfApi()
    with _explained(address, "write"):
        api.create_repo(address.repository, exist_ok=True)
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)


def push(folder: Path, text: str) -> str:
    """Uploads the files of a folder as one commit, and returns the address with that commit.

    Weights of a former export go with that commit; other files of the repository stay.

    Raises:
      UserError, MachineError: as create_repository.
    """
    address = parse(text)
    with _explained(address, "write"):
        commit = (
            _library(text)
            .HfApi()
            .upload_folder(
                repo_id=address.repository,
                folder_path=folder,
                revision=address.revision,
                commit_message="Model exported by t5g2",
                delete_patterns=list(REPLACED),
            )
        )
    return str(address._replace(revision=commit.oid))


def _library(text: str) -> Any:
    return require("huggingface_hub", "hub", otherwise=f"give a folder of this machine instead of {text}")


def _errors(text: str) -> Any:
    _library(text)
    return require("huggingface_hub.errors", "hub")


def _download(address: Address, wanted: list[str], *, ignored: str | None = None) -> Path:
    """Downloads the files that match, and returns the folder of the commit in the cache."""
    with _explained(address, "read"):
        return Path(
            _library(str(address)).snapshot_download(
                address.repository, revision=address.revision, allow_patterns=wanted, ignore_patterns=ignored
            )
        )


def _listed(address: Address) -> list[str] | None:
    """Returns the names of all files of the repository; None = the hub was not reached, and the cache has no list."""
    library, errors = _library(str(address)), _errors(str(address))
    try:
        return sorted(file.path for file in library.get_cached_repo_tree(address.repository, revision=address.revision))
    except errors.CachedRepoTreeNotFoundError:
        return None


def _not_cached(text: str, address: Address, what: str, listed: list[str] | None) -> UserError:
    unknown = ", so that it is not known whether the repository does" * (listed is None)
    return UserError(
        f"{text}: the hub's cache on this machine does not have {what}, and the hub was not reached{unknown}; check "
        f"the network and that HF_HUB_OFFLINE is not set, download it where there is a network (hf download "
        f"{address.repository}), or give a folder{_slash_note(parse(text))}"
    )


def _gguf_note(address: Address) -> str:
    """Returns the end of a message that names GGUF files of the repository; "" if there are none."""
    names = [name for name in _listed(address) or () if name.lower().endswith(".gguf")]
    return f"; name one of its GGUF files: {', '.join(str(address._replace(path=n)) for n in names[:4])}" * bool(names)


@contextmanager
def _explained(address: Address, action: Literal["read", "write"]) -> Iterator[None]:
    """Turns errors of huggingface_hub into what the user can do about them."""
    errors, page = _errors(str(address)), f"{SITE}/{address.repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{address} is gated: its owner asks you to accept a licence; do so at {page}, then run `hf auth login` "
            f"with a token of that account, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{address}: there is no revision {address.revision!r} in {address.repository}; give a branch, a tag or "
            f"the 40 digits of a commit, which {page}/commits lists, or leave it out{_slash_note(address)}"
        ) from None
    except (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError) as error:
        raise _refused(address, action, error) from None
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(address, action, error) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise _refused(address, action, error) from None
        if status < 500 and status != 429:
            raise UserError(f"{address}: the hub refuses this ({_line(error)}); check the address") from None
        raise MachineError(f"{address}: the hub fails ({_line(error)}); run the command again later") from None
    except errors.HTTPError as error:  # of the HTTP library, without an answer of the hub
        raise _unreachable(address, action, error) from None


def _slash_note(address: Address) -> str:
    """Returns the end of a message on an address whose path may be the rest of a branch's name; "" if it has none."""
    if address.revision is None or not address.path or COMMIT.fullmatch(address.revision):
        return ""
    branch = f"{address.revision}/{address.path}"
    return (
        f" ({address.path!r} after it was read as a path in the repository; the branch {branch!r} is "
        f"{address._replace(revision=branch.replace('/', '%2F'), path='')})"
    )


def _refused(address: Address, action: str, error: Exception) -> UserError:
    if action == "write":
        return UserError(
            f"{address}: the hub does not let this user write there ({_line(error)}); run `hf auth login` with a token "
            f"that may write to {address.repository}, or set HF_TOKEN"
        )
    return UserError(
        f"{address}: there is no repository {address.repository}, or it is private; check the name, or run "
        f"`hf auth login` with a token that may read it"
    )


def _unreachable(address: Address, action: str, error: Exception) -> UserError:
    reason = _line(error.__cause__ or error)
    if action == "write":
        return UserError(
            f"{address}: the hub cannot be reached ({reason}); check the network and that HF_HUB_OFFLINE is not "
            f"set, or export with --out and upload the folder later"
        )
    return UserError(
        f"{address}: the hub cannot be reached ({reason}), and its cache on this machine does not have all of "
        f"the model; check the network and that HF_HUB_OFFLINE is not set, download it where there is a network (hf "
        f"download {address.repository}), or give a folder{_slash_note(address)}"
    )


def _line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the hints that follow."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")[:300]
