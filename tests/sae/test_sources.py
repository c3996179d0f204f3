from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from qscope_trl.errors import CheckpointError
from qscope_trl.sae import sources
from qscope_trl.sae.suite import SAESuite
from tests.sae.sae_files import (
    QWEN_NAME,
    K,
    random_weights,
    saelens_config,
    write_qwen,
    write_saelens,
    write_sparsify,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = f"Qwen/{QWEN_NAME}"


class FakeHub:
    """A Hub with one repository, whose files lie in `remote` and are copied to the cache on download."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote = remote
        self.cache = cache
        self.downloaded: list[str] = []
        self.failure: Exception | None = None

    def model_info(self, repo: str, *, revision: str | None = None) -> Any:
        if self.failure is not None:
            raise self.failure
        assert revision in (None, "main", COMMIT)
        files = [path.relative_to(self.remote).as_posix() for path in self.remote.rglob("*") if path.is_file()]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def download(self, repo: str, filename: str, *, revision: str) -> str:
        assert revision == COMMIT
        target = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT / filename
        if not target.exists():
            if self.failure is not None:
                raise self.failure
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.remote / filename, target)
            reference = self.cache / f"models--{repo.replace('/', '--')}" / "refs" / "main"
            reference.parent.mkdir(exist_ok=True)
            reference.write_text(COMMIT)
            self.downloaded.append(filename)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "remote", tmp_path / "cache")
    for layer in (0, 1, 2):
        write_qwen(fake.remote, layer, random_weights(layer))
    (fake.remote / "README.md").write_text("")
    monkeypatch.setattr(sources, "HfApi", lambda: fake)
    monkeypatch.setattr(sources, "hf_hub_download", fake.download)
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.chdir(tmp_path)
    return fake


def http_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    # Their constructor asks for a response of the HTTP client, which differs by version.
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


def test_hub_repository_downloads_a_layer_when_it_is_used(hub: FakeHub) -> None:
    suite = SAESuite.from_pretrained(REPO)
    assert suite.layers == (0, 1, 2)
    assert suite.revision == COMMIT
    assert hub.downloaded == []
    assert suite.spec(1).k == K
    assert hub.downloaded == ["layer1.sae.pt"]
    local = SAESuite.from_pretrained(hub.remote, k=K)
    assert suite.fingerprint(1) == local.fingerprint(1)
    assert repr(suite) == f"SAESuite('{REPO}', layers 0-2, revision='{COMMIT}')"


@pytest.mark.parametrize("failure", [errors.OfflineModeIsEnabled("offline"), ConnectionError("no route")])
def test_cached_layers_are_used_without_a_connection(hub: FakeHub, failure: Exception) -> None:
    SAESuite.from_pretrained(REPO).spec(1)
    hub.failure = failure
    for revision in (None, "main", COMMIT):
        suite = SAESuite.from_pretrained(REPO, revision=revision)
        assert suite.layers == (1,)
        assert suite.revision == COMMIT
        assert suite.spec(1).k == K


def test_failure_of_the_http_client_itself_counts_as_no_connection(hub: FakeHub) -> None:
    SAESuite.from_pretrained(REPO).spec(1)
    client_error = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    hub.failure = client_error("cannot connect")
    assert SAESuite.from_pretrained(REPO).layers == (1,)


def test_hub_out_of_reach_without_a_cache_is_an_error_of_ours(hub: FakeHub) -> None:
    hub.failure = ConnectionError("no route")
    with pytest.raises(
        CheckpointError, match=f"out of reach and '{REPO}' is not in the local cache: no route. Download"
    ):
        SAESuite.from_pretrained(REPO)


def test_download_that_fails_is_an_error_of_ours(hub: FakeHub) -> None:
    suite = SAESuite.from_pretrained(REPO)
    hub.failure = ConnectionError("no route")
    with pytest.raises(CheckpointError, match=f"Cannot download `layer0.sae.pt` of '{REPO}' at {COMMIT}"):
        suite.spec(0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "neither a local path nor a model repository on the Hub"),
        (errors.GatedRepoError, "is gated. Accept its conditions"),
        (errors.RevisionNotFoundError, "has no revision `main`"),
    ],
)
def test_hub_refusals_say_what_to_do(hub: FakeHub, kind: type[errors.HfHubHTTPError], message: str) -> None:
    hub.failure = http_error(kind)
    with pytest.raises(CheckpointError, match=message):
        SAESuite.from_pretrained(REPO, revision="main")


def test_folder_in_a_hub_repository_can_be_named(hub: FakeHub) -> None:
    write_saelens(hub.remote / "width_1k" / "a", random_weights(), saelens_config(5))
    write_saelens(hub.remote / "width_1k" / "b", random_weights(), saelens_config(6))
    suite = SAESuite.from_pretrained("owner/name/width_1k")
    assert suite.layers == (5, 6)
    assert hub.downloaded == ["width_1k/a/cfg.json", "width_1k/b/cfg.json"]
    assert suite.spec(6).k == K
    assert hub.downloaded[2:] == ["width_1k/b/sae_weights.safetensors"]


def test_local_path_wins_over_a_hub_id(hub: FakeHub) -> None:
    write_qwen(Path("owner/name"), 7, random_weights())
    assert SAESuite.from_pretrained("owner/name").layers == (7,)
    assert hub.downloaded == []


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./nowhere/at", "a b/c"])
def test_path_that_does_not_exist_is_refused(hub: FakeHub, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"There is no file or folder '{name}'"):
        SAESuite.from_pretrained(name)


def test_empty_folder_and_unknown_format_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No SAE in '.*': found nothing. Expected `layer{n}.sae.pt` files"):
        SAESuite.from_pretrained(tmp_path)
    for index in range(7):
        (tmp_path / f"params{index}.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found `params0.npz`, .*`params4.npz` and more"):
        SAESuite.from_pretrained(tmp_path)


def test_parent_folder_skips_what_is_not_a_layers_output(tmp_path: Path) -> None:
    for name in ("layers.3", "layers.11", "layers.3.mlp", "embed_tokens"):
        write_sparsify(tmp_path / name, random_weights())
    assert SAESuite.from_pretrained(tmp_path).layers == (3, 11)


def test_parent_folder_without_any_layers_output_says_why(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.3.mlp", random_weights())
    with pytest.raises(CheckpointError, match=r"sparsify folder 'layers.3.mlp' does not name a decoder layer"):
        SAESuite.from_pretrained(tmp_path)


def test_two_saes_of_one_layer_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_saelens(tmp_path / name, random_weights(), saelens_config(5))
    with pytest.raises(CheckpointError, match=r"two SAEs for layer 5: `a/sae_weights.safetensors` and `b/"):
        SAESuite.from_pretrained(tmp_path)
    assert SAESuite.from_pretrained(tmp_path / "b").layers == (5,)


def test_missing_or_broken_configuration_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path, random_weights(), saelens_config())
    config = tmp_path / "cfg.json"
    for text, message in [("{", "cannot be read as JSON"), (json.dumps([1]), "holds a list, expected a mapping")]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            SAESuite.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"`cfg.json` is missing"):
        SAESuite.from_pretrained(tmp_path)


def test_single_files_of_every_format_open(tmp_path: Path) -> None:
    files = {
        3: write_qwen(tmp_path / QWEN_NAME, 3, random_weights()),
        5: write_saelens(tmp_path / "lens", random_weights(), saelens_config(5)),
        9: write_sparsify(tmp_path / "layers.9", random_weights()),
    }
    write_qwen(tmp_path / QWEN_NAME, 4, random_weights())
    for layer, path in files.items():
        assert SAESuite.from_pretrained(path).layers == (layer,)
        assert SAESuite.from_pretrained(str(path)).spec(layer).k == K
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Cannot tell the layer of '.*weights.pt'"):
        SAESuite.from_pretrained(tmp_path / "weights.pt")


def test_link_to_a_folder_keeps_the_name_that_states_k(tmp_path: Path) -> None:
    write_qwen(tmp_path / QWEN_NAME, 3, random_weights())
    os.symlink(tmp_path / QWEN_NAME, tmp_path / "scope")
    assert SAESuite.from_pretrained(tmp_path / "scope").spec(3).k == K


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_qwen(tmp_path / QWEN_NAME, 3, random_weights())
    assert SAESuite.from_pretrained(f"~/{QWEN_NAME}").layers == (3,)
