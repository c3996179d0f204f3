"""Where SAE files are: local folders, single files and Hub repositories, listed without reading weights.

Left out on purpose: authentication, proxies and cache locations. huggingface_hub's own settings apply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qscope_trl.errors import CheckpointError
from qscope_trl.sae.loading import QWEN_SCOPE_FILE, saelens_layer, sparsify_layer

# HfHubHTTPError derives from the HTTP client's own base class (of requests, httpx or httpx2, by version): failures to
# connect derive from that one, or from OSError.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception
)
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (*_CONNECTION_ERRORS, EntryNotFoundError, ValueError)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True, kw_only=True)
class LayerFile:
    """One layer's files within a source.

    Args:
        format: Which function of `loading` opens it.
        weights: Weights file, relative to the source.
        config: `cfg.json` beside it, for the formats that have one.
    """

    format: Literal["qwen-scope", "saelens", "sparsify"]
    weights: str
    config: str | None = None


class Source:
    """A place with SAE files.

    Args:
        name: What the user wrote; appears in messages and FeatureSets.
        revision: Commit of a Hub repository.
        files: Names of the files there, relative, with `/`.
        fetch: Relative name to a local path; downloads where needed.
        label: Name of the folder itself, which may state width, k or layer.
    """

    def __init__(
        self, *, name: str, revision: str | None, files: Iterable[str], fetch: Callable[[str], Path], label: str
    ) -> None:
        self.name = name
        self.revision = revision
        self.label = label
        self.fetch = fetch
        self.layers = _find_layers(name, label, sorted(files), self.read_config)

    def read_config(self, file: str) -> dict[str, Any]:
        """What a `cfg.json` says.

        Raises:
            CheckpointError: If it is no JSON mapping.
        """
        path = self.fetch(file)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CheckpointError(f"'{path}' cannot be read as JSON: {err}") from err
        if not isinstance(config, dict):
            raise CheckpointError(f"'{path}' holds a {type(config).__name__}, expected a mapping.")
        return config


def open_source(source: str, revision: str | None) -> Source:
    """List what a local path or a Hub id holds.

    Args:
        source: Folder, file, `owner/name` on the Hub, or `owner/name/folder` there.
        revision: Branch, tag or commit on the Hub; ignored for local paths.

    Raises:
        CheckpointError: If nothing is there, or nothing that can be read.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _open_local(source, path)
    if _HUB_ID.fullmatch(source) is None or source.startswith("."):
        raise CheckpointError(
            f"There is no file or folder '{source}'. Pass a folder with `layer{{n}}.sae.pt` files, or a Hub id "
            "such as `Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`."
        )
    return _open_hub(source, revision)


def _open_local(source: str, path: Path) -> Source:
    if path.is_file():
        if QWEN_SCOPE_FILE.fullmatch(path.name) is None and not (path.parent / "cfg.json").is_file():
            raise CheckpointError(f"Cannot tell the layer of '{path}'. Name the file `layer{{n}}.sae.pt`, n from 0.")
        files = [path.name, *(["cfg.json"] if QWEN_SCOPE_FILE.fullmatch(path.name) is None else [])]
        root = path.parent
    else:
        root = path
        files = [item.relative_to(root).as_posix() for item in [*root.glob("*"), *root.glob("*/*")] if item.is_file()]
    # A link named by hand may point to a folder with the telling name, and the reverse.
    label = str(root.absolute()) if root.absolute() == root.resolve() else f"{root.resolve()}/{root.absolute()}"
    return Source(name=source, revision=None, files=files, fetch=root.joinpath, label=label)


def _open_hub(source: str, revision: str | None) -> Source:
    owner, name, *folder = source.split("/")
    repo, prefix = f"{owner}/{name}", "".join(f"{part}/" for part in folder)
    commit, files = _list_hub(repo, revision)
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    shallow = [file for file in inside if file.count("/") <= 1]
    return Source(
        name=source, revision=commit, files=shallow, fetch=partial(_download, repo, commit, prefix), label=source
    )


def _download(repo: str, commit: str, prefix: str, file: str) -> Path:
    try:
        return Path(hf_hub_download(repo, prefix + file, revision=commit))
    except _DOWNLOAD_ERRORS as err:
        raise CheckpointError(
            f"Cannot download `{prefix}{file}` of '{repo}' at {commit}, and it is not in the local cache: "
            f"{_first_sentence(err)} Check the connection and the space on the disk, or pass a local folder."
        ) from err


def _list_hub(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """Commit and file names of a repository, from the Hub, or from the local cache where the Hub is out of reach."""
    wanted = "" if revision is None else f" at revision `{revision}`"
    try:
        info = HfApi().model_info(repo, revision=revision)
    except GatedRepoError as err:
        raise CheckpointError(
            f"'{repo}' on the Hub is gated. Accept its conditions on its page, then log in with `hf auth login`."
        ) from err
    except RevisionNotFoundError as err:
        raise CheckpointError(
            f"'{repo}' on the Hub has no revision `{revision}`. Pass a branch, tag or commit."
        ) from err
    except (RepositoryNotFoundError, HFValidationError) as err:
        raise CheckpointError(
            f"'{repo}' is neither a local path nor a model repository on the Hub{wanted}. Check the spelling; a "
            "private one needs `hf auth login`."
        ) from err
    except _CONNECTION_ERRORS as err:
        cached = _list_cache(repo, revision or "main")
        if cached is None:
            raise CheckpointError(
                f"The Hub is out of reach and '{repo}'{wanted} is not in the local cache: {_first_sentence(err)} "
                "Download it where there is a connection (`hf download`), or pass a local folder."
            ) from err
        return cached
    return str(info.sha), [item.rfilename for item in info.siblings or []]


def _list_cache(repo: str, revision: str) -> tuple[str, list[str]] | None:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    files = [item.relative_to(snapshot).as_posix() for item in snapshot.rglob("*") if item.is_file()]
    return (commit, files) if files else None


def _find_layers(
    source: str, label: str, files: list[str], read_config: Callable[[str], Mapping[str, Any]]
) -> dict[int, LayerFile]:
    found: dict[int, LayerFile] = {}
    refused: list[CheckpointError] = []
    for file in files:
        path = PurePosixPath(file)
        config = str(path.with_name("cfg.json"))
        match = QWEN_SCOPE_FILE.fullmatch(path.name)
        try:
            if match is not None and len(path.parts) == 1:
                # Sorted, so safetensors comes after the file it was converted from, and takes its place.
                if int(match[1]) in found and found[int(match[1])].format == "qwen-scope":
                    del found[int(match[1])]
                layer, entry = int(match[1]), LayerFile(format="qwen-scope", weights=file)
            elif path.name == "sae_weights.safetensors":
                _require_config(config, files, source)
                layer = saelens_layer(read_config(config), str(path.parent))
                entry = LayerFile(format="saelens", weights=file, config=config)
            elif path.name == "sae.safetensors":
                _require_config(config, files, source)
                layer = sparsify_layer(path.parent.name or re.split(r"[/\\]", label)[-1])
                entry = LayerFile(format="sparsify", weights=file, config=config)
            else:
                continue
        except CheckpointError as err:
            refused.append(err)
            continue
        if layer in found:
            raise CheckpointError(
                f"'{source}' has two SAEs for layer {layer}: `{found[layer].weights}` and `{file}`. "
                "Pass the folder of one of them."
            )
        found[layer] = entry
    if found:
        return dict(sorted(found.items()))
    if refused:
        raise refused[0]
    shown = ", ".join(f"`{file}`" for file in files[:5]) or "nothing"
    raise CheckpointError(
        f"No SAE in '{source}': found {shown}{' and more' if len(files) > 5 else ''}. Expected `layer{{n}}.sae.pt` "
        "files (Qwen-Scope), or folders with `cfg.json` and `sae_weights.safetensors` (SAELens) or `sae.safetensors` "
        "(sparsify)."
    )


def _require_config(config: str, files: list[str], source: str) -> None:
    if config not in files:
        raise CheckpointError(
            f"`{config}` is missing in '{source}'. It says how the weights beside it are meant; copy it from where "
            "they came from."
        )


def _first_sentence(err: Exception) -> str:
    line = (str(err).strip().splitlines() or [type(err).__name__])[0]
    return line.split(". ")[0].rstrip(".") + "."
