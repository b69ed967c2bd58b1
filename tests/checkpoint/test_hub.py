"""Models at Hugging Face's hub: what is downloaded, from which commit, and what is told where that fails."""

import json
import shutil
import sys
from unittest import mock

import httpx2
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils._http import default_client_factory

import t5g2
from t5g2 import cli
from t5g2.checkpoint import export_folder, hub, source_folder
from t5g2.checkpoint.import_folder import import_model, open_any, open_tower
from t5g2.core.errors import MachineError, UserError
from tests import hub_cache, tiny
from tests.checkpoint.foreign_folders import save
from tests.hub_cache import COMMIT, OTHER_COMMIT, Hub

NAME = "owner/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Hugging Face folder of a tiny Gemma 3, with files beside it that no model needs."""
    folder = tmp_path_factory.mktemp("exported")
    export_folder.export_model(save(folder / "ours", tiny.GEMMA3, jnp.float32), folder / "theirs")
    (folder / "theirs" / "onnx").mkdir()
    for name in ("tiny.gguf", "pytorch_model.bin", "README.md", "onnx/model.safetensors"):
        (folder / "theirs" / name).write_bytes(b"not needed")
    return folder / "theirs"


@pytest.fixture
def cache(tmp_path):
    """The hub's cache, empty."""
    with hub_cache.empty(tmp_path / "hub", offline=False) as folder:
        yield folder


@pytest.fixture
def offline(tmp_path):
    """The hub's cache, empty, of a machine that is not to ask the hub."""
    with hub_cache.empty(tmp_path / "hub", offline=True) as folder:
        yield folder


@pytest.fixture
def serve(cache, monkeypatch):
    """A function: the hub answers as it says."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts

    def start(answers):
        served = Hub(answers)
        huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=served, follow_redirects=True))
        return served

    yield start
    huggingface_hub.set_client_factory(default_client_factory)


def repository(folder, *, name=NAME, commit=COMMIT, revision=None):
    """Returns the hub's answers for a repository with the files of a folder."""
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    info = json.dumps({"id": name, "sha": commit, "siblings": [], "tags": []}).encode()
    tree = [
        {"type": "file", "path": p, "size": (folder / p).stat().st_size, "oid": f"{i:040x}"}
        for i, p in enumerate(paths)
    ]
    answers = {
        ("GET", f"/api/models/{name}" + (f"/revision/{revision}" if revision else "")): (200, {}, info),
        ("GET", f"/api/models/{name}/tree/{commit}"): (200, {}, json.dumps(tree).encode()),
    }
    for i, path in enumerate(paths):
        content = (folder / path).read_bytes()
        headers = {"ETag": f'"{i:040x}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}
        answers["HEAD", f"/{name}/resolve/{commit}/{path}"] = (200, headers, b"")
        answers["GET", f"/{name}/resolve/{commit}/{path}"] = (200, headers, content)
    return answers


def leaves(folder):
    return {key: leaf.read() for key, leaf in folder.leaves.items()}


def assert_same_weights(ours, theirs):
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key])


def test_a_model_in_the_cache_is_read_without_a_network(offline, exported, tmp_path):
    snapshot = hub_cache.add(offline, NAME, exported)
    opened = open_any("hf://owner/tiny")
    assert opened.path == snapshot
    assert_same_weights(opened, open_any(exported))
    imported = import_model("hf://owner/tiny", tmp_path / "imported")
    assert imported.provenance["source"] == f"hf://owner/tiny@{COMMIT}"


def test_a_tag_and_a_commit_are_revisions_of_their_own(offline, exported):
    hub_cache.add(offline, NAME, exported, revision="v1", commit=OTHER_COMMIT)
    hub_cache.add(offline, NAME, exported)
    assert source_folder.folder_of("hf://owner/tiny@v1").name == OTHER_COMMIT
    assert source_folder.folder_of(f"hf://owner/tiny@{OTHER_COMMIT}").name == OTHER_COMMIT
    assert source_folder.folder_of("hf://owner/tiny").name == COMMIT


def test_only_what_a_model_needs_is_downloaded(serve, exported):
    served = serve(repository(exported))
    assert_same_weights(open_any("hf://owner/tiny"), open_any(exported))
    downloaded = {path.rpartition(f"{COMMIT}/")[2] for method, path in served.asked if "/resolve/" in path}
    assert downloaded == {"config.json", "generation_config.json", "model.safetensors"}
    # a second process finds all of it in the cache, and asks for the commit of the branch alone
    served.asked.clear()
    hub_cache.forget()
    open_any("hf://owner/tiny")
    assert served.asked == [("GET", "/api/models/owner/tiny")]


def test_a_process_reads_one_commit_even_if_the_branch_moves(serve, exported):
    serve(repository(exported))
    before = open_any("hf://owner/tiny").path
    serve(repository(exported, commit=OTHER_COMMIT))
    assert open_any("hf://owner/tiny").path == before
    assert hub.pinned("hf://owner/tiny") == f"hf://owner/tiny@{COMMIT}"


def test_a_model_in_a_folder_of_a_repository(serve, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "whole" / "deep" / "model")
    served = serve(repository(tmp_path / "whole"))
    opened = open_any("hf://owner/tiny/deep/model")
    assert opened.provenance["source"] == f"hf://owner/tiny@{COMMIT}/deep/model"
    assert not any(path.endswith((".gguf", ".bin", ".md")) for _, path in served.asked)


def test_an_orbax_checkpoint_is_downloaded_whole(serve, tmp_path):
    (tmp_path / "flax" / "2b" / "d").mkdir(parents=True)
    for name in ("2b/_METADATA", "2b/d/0f3a", "2b/manifest.ocdbt", "tokenizer.model", "2b.tar.gz"):
        (tmp_path / "flax" / name).write_bytes(b"{}")
    served = serve(repository(tmp_path / "flax"))
    folder = source_folder.folder_of("hf://owner/tiny")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {"2b/_METADATA", "2b/d/0f3a", "2b/manifest.ocdbt", "tokenizer.model"}
    assert not any(path.endswith("2b.tar.gz") for _, path in served.asked)


def test_a_gguf_file_is_named(serve, tmp_path):
    (tmp_path / "repository").mkdir()
    for name in ("tiny-Q4_0.gguf", "tiny-Q8_0.gguf"):
        (tmp_path / "repository" / name).write_bytes(b"GGUF")
    served = serve(repository(tmp_path / "repository"))
    names = f"hf://owner/tiny@{COMMIT}/tiny-Q4_0.gguf, hf://owner/tiny@{COMMIT}/tiny-Q8_0.gguf"
    with pytest.raises(UserError, match=rf"hf://owner/tiny has no weights .*; name one of its GGUF files: {names}"):
        open_any("hf://owner/tiny")
    with pytest.raises(UserError, match=r"tiny-Q2\.gguf: there is no such file in the repository; name one of its GGU"):
        open_any("hf://owner/tiny/tiny-Q2.gguf")
    assert not any("/resolve/" in path for _, path in served.asked)
    assert hub.snapshot("hf://owner/tiny/tiny-Q4_0.gguf").read_bytes() == b"GGUF"


REFUSALS = {
    "gated": (
        403,
        "GatedRepo",
        "is gated: .*accept a licence; do so at https://huggingface.co/owner/tiny, then run",
    ),
    "missing": (
        401,
        "RepoNotFound",
        "there is no repository owner/tiny, or it is private; check the name, or run `hf aut",
    ),
    "revision": (
        404,
        "RevisionNotFound",
        "there is no revision 'v9' in owner/tiny; give a branch, a tag or the 40 digits",
    ),
    "forbidden": (403, "", "there is no repository owner/tiny, or it is private"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_says_what_to_do(serve, case):
    status, code, message = REFUSALS[case]
    serve({("GET", "/api/models/owner/tiny/revision/v9"): (status, {"X-Error-Code": code}, b"{}")})
    for read in (open_any, open_tower):
        with pytest.raises(UserError, match=message):
            read("hf://owner/tiny@v9")


def test_a_gated_repository_of_which_only_the_files_are_closed(serve, exported):
    """The hub tells anybody the commit of a gated repository."""
    answers = repository(exported)
    closed = (403, {"X-Error-Code": "GatedRepo"}, b"{}")
    serve({key: closed if "/resolve/" in key[1] else answer for key, answer in answers.items()})
    with pytest.raises(UserError, match="is gated: its owner asks you to accept a licence"):
        open_any("hf://owner/tiny")


def test_no_network(serve, exported, cache):
    serve({("GET", "/api/models/owner/tiny"): None})
    with pytest.raises(UserError, match=r"cannot be reached .*check the network .*hf download owner/tiny"):
        open_any("hf://owner/tiny")
    # what the cache has is read all the same
    hub_cache.add(cache, NAME, exported)
    assert open_any("hf://owner/tiny").config == tiny.GEMMA3


def test_a_network_that_ends_during_a_download(serve, exported):
    answers = repository(exported)
    serve({key: None if key[1].endswith("model.safetensors") else answer for key, answer in answers.items()})
    with pytest.raises(UserError, match="the hub cannot be reached"):
        open_any("hf://owner/tiny")


def test_offline_without_the_model(offline):
    with pytest.raises(UserError, match=r"cannot be reached .*does not have all of the model; check .*HF_HUB_OFFLINE"):
        open_any("hf://owner/tiny")


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
@pytest.mark.parametrize(("path", "lacks"), [("", "its weights"), ("/deep", "its weights"), ("/x.gguf", "this file")])
def test_offline_the_cache_does_not_say_what_the_repository_has(offline, tmp_path, revision, path, lacks):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    hub_cache.add(offline, NAME, tmp_path / "part")
    with pytest.raises(UserError) as raised:
        open_any(f"hf://owner/tiny{revision}{path}")
    assert str(raised.value).startswith(
        f"hf://owner/tiny{revision}{path}: the hub's cache on this machine does not have {lacks}, and the hub was not "
        f"reached, so that it is not known whether the repository does; check the network and that HF_HUB_OFFLINE is "
        f"not set, download it where there is a network (hf download owner/tiny)"
    )


def test_a_branch_with_a_slash_in_its_name(offline):
    """The rest after the first slash is a path; the message has the address of the branch."""
    address = "hf://owner/tiny@feature/x"
    note = (
        r"\('x' after it was read as a path in the repository; the branch 'feature/x' is hf://owner/tiny@feature%2Fx\)"
    )
    with pytest.raises(UserError, match=f"the hub cannot be reached .*{note}"):
        open_any(address)
    assert hub.parse("hf://owner/tiny@feature%2Fx") == ("owner/tiny", "feature/x", "")


def test_a_branch_that_there_is_not_may_be_the_beginning_of_another(serve):
    serve({("GET", "/api/models/owner/tiny/revision/feature"): (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")})
    with pytest.raises(
        UserError, match=r"no revision 'feature' in owner/tiny; .*branch 'feature/x' is hf://owner/tiny@f"
    ):
        open_any("hf://owner/tiny@feature/x")


def test_a_failure_of_the_hub_is_none_of_the_input(serve):
    commit = f"hf://owner/tiny@{COMMIT}"
    serve({("POST", "/api/repos/create"): (429, {}, b"{}")})
    with pytest.raises(MachineError, match=r"the hub fails .*run the command again later"):
        hub.create_repository("hf://owner/tiny")
    serve({("GET", f"/api/models/owner/tiny/tree/{COMMIT}"): (500, {}, b"{}")})
    with pytest.raises(UserError, match="the hub cannot be reached"):
        open_any(commit)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://tiny", "hf://tiny is no address of a model .*; write hf://OWNER/NAME"),
        ("hf://owner/tiny@", "no address of a model"),
        ("hf://owner/ti..ny", "no address of a model"),
        ("hf://datasets/owner/tiny", "is a dataset and not a model"),
    ],
)
def test_what_is_no_address(cache, address, message):
    with pytest.raises(UserError, match=message):
        open_any(address)


def test_without_the_extra_the_command_ends_with_2_and_names_it(cache, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["import", "--source=hf://owner/tiny", "--out=unused"]) == 2
    assert (
        "huggingface_hub is not installed; run `pip install 't5g2[hub]'`, or give a folder of this machine instead of "
        "hf://owner/tiny"
    ) in capsys.readouterr().err


def test_paths_of_the_cache_are_recorded_as_addresses(tmp_path):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT
    assert hub.recorded(snapshot) == f"hf://owner/tiny@{COMMIT}"
    assert hub.recorded(snapshot / "a" / "b.gguf") == f"hf://owner/tiny@{COMMIT}/a/b.gguf"
    for other in (tmp_path, snapshot.with_name("main"), tmp_path / "datasets--owner--tiny" / "snapshots" / COMMIT):
        assert hub.recorded(other) == str(other)


def test_load_takes_an_address(offline, exported):
    hub_cache.add(offline, NAME, exported)
    model = t5g2.load("hf://owner/tiny", dtype="bfloat16")
    assert model.config == tiny.GEMMA3
    assert model.folder.provenance["source"] == f"hf://owner/tiny@{COMMIT}"


@pytest.fixture
def uploads(cache, monkeypatch):
    """Calls of huggingface_hub that write, with the files that they would upload."""
    files, api = [], huggingface_hub.HfApi
    calls = mock.Mock()
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(api, name, mock.create_autospec(getattr(api, name)))
        calls.attach_mock(getattr(api, name), name)

    def upload(_, *, folder_path, **options):
        files.append(sorted(path.name for path in folder_path.iterdir()))
        return mock.Mock(oid=COMMIT)

    api.upload_folder.side_effect = upload
    return calls, files


def test_export_pushes_one_commit(uploads, exported, tmp_path, capsys):
    calls, files = uploads
    assert cli.main(["export", f"--model={exported}", "--push=hf://owner/new@branch"]) == 0
    assert f"pushed hf://owner/new@{COMMIT}" in capsys.readouterr().out
    assert [call[0] for call in calls.mock_calls] == ["create_repo", "create_branch", "upload_folder"]
    assert files == [["config.json", "generation_config.json", "model.safetensors"]]
    options = calls.mock_calls[-1].kwargs
    assert (options["repo_id"], options["revision"]) == ("owner/new", "branch")
    # of a former export in several files, which would be read with the new one
    former = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md", "onnx/a.safetensors"]
    gone = huggingface_hub.utils.filter_repo_objects(former, allow_patterns=options["delete_patterns"])
    assert list(gone) == former[:2]
    assert not options["folder_path"].exists(), "the temporary folder is gone"
    # a folder that is asked for stays
    assert cli.main(["export", f"--model={exported}", "--push=hf://owner/new", f"--out={tmp_path / 'kept'}"]) == 0
    assert (tmp_path / "kept" / "model.safetensors").exists()
    assert files[1] == files[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out is missing: give a folder to write, or --push=hf://OWNER/NAME, or both"),
        (["--push=owner/new"], "--push=owner/new is no address of Hugging Face's hub"),
        ([f"--push=hf://owner/new@{COMMIT}"], "has a commit; push to hf://OWNER/NAME[@BRANCH]"),
        (["--push=hf://owner/new/folder"], "has a path; push to"),
    ],
)
def test_where_an_export_goes_is_checked_first(uploads, exported, flags, message, capsys):
    calls, _ = uploads
    assert cli.main(["export", f"--model={exported}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not calls.mock_calls


@pytest.mark.parametrize(
    ("model", "flags"),
    [("missing", []), ("empty", []), ("exported", ["--dtype=int4"])],
)
def test_no_repository_is_created_for_a_model_that_cannot_be_exported(uploads, exported, tmp_path, model, flags):
    calls, _ = uploads
    (tmp_path / "empty").mkdir()
    folder = exported if model == "exported" else tmp_path / model
    assert cli.main(["export", f"--model={folder}", "--push=hf://owner/new", *flags]) == 2
    assert not calls.mock_calls


@pytest.mark.parametrize("status", [401, 403])
def test_a_push_without_the_right_ends_before_the_export(serve, exported, tmp_path, status, capsys):
    serve({("POST", "/api/repos/create"): (status, {}, b'{"error": "no"}')})
    flags = [f"--model={exported}", "--push=hf://owner/new", f"--out={tmp_path / 'out'}"]
    assert cli.main(["export", *flags]) == 2
    message = capsys.readouterr().err
    assert "does not let this user write there" in message
    assert "run `hf auth login` with a token that may write to owner/new" in message
    assert not (tmp_path / "out").exists()


def test_a_push_without_a_network(offline, exported, capsys):
    assert cli.main(["export", f"--model={exported}", "--push=hf://owner/new"]) == 2
    assert "export with --out and upload the folder later" in capsys.readouterr().err
