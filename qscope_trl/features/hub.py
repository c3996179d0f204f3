"""FeatureSets on the Hugging Face Hub: a repository with `features.yaml` and a card of what they were chosen on.

Left out: the SAEs themselves, which belong to their makers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.errors import FeatureSetError

FEATURES_FILE = "features.yaml"
"""The set's file in its repository."""

LICENCE = (
    "The SAEs are not part of this repository and come under their own licence; Qwen-Scope's is stated on its model "
    "pages. Read it before you use them."
)
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_MOST = 50
_ADDRESS = "https://pypi.org/project/qscope-trl/"


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name` of a repository and is no path to a file that is there."""
    named = _HUB_ID.fullmatch(text) is not None and Path(text).suffix not in (".yaml", ".yml", ".json")
    return named and not Path(text).exists()


def public_name(name: str) -> str:
    """A Hub id or plain name as it is; of a path only its last part, since a card is read by others."""
    return name if is_hub_id(name) else re.split(r"[\\/]+", name.rstrip("\\/"))[-1] or name


def without_paths(value: Any) -> Any:
    """Plain data in which paths from a root, a home or a drive are cut to their last part."""
    if isinstance(value, str):
        return public_name(value) if re.match(r"/|~/|\\\\|[A-Za-z]:[\\/]", value) else value
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list | tuple) else value


def upload(
    repo_id: str, text: str, card: str, *, token: str | None, private: bool | None, revision: str | None, message: str
) -> str:
    """Put a set and its card into a repository, in one commit; it is made if there is none.

    Returns:
        Address of the commit.

    Raises:
        FeatureSetError: If the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    files = {FEATURES_FILE: text, "README.md": card}
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except (OSError, ValueError, RuntimeError) as err:
        raise FeatureSetError(
            f"The features cannot be pushed to '{repo_id}': {_first_line(err)} Check the name and the connection, and "
            f"that `hf auth login` was done with a token that may write."
        ) from err
    return str(commit.commit_url)


def download(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """The set's file of a repository, from the Hub or the local cache.

    Raises:
        FeatureSetError: If there is none, or the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, FEATURES_FILE, revision=revision, token=token))
    except (OSError, ValueError, RuntimeError) as err:
        raise FeatureSetError(
            f"No `{FEATURES_FILE}` of '{repo_id}' on the Hub, nor in the local cache: {_first_line(err)} If a local "
            f"file was meant, its name ends in .yaml, .yml or .json; a private repository needs `hf auth login`."
        ) from err


def card(repo_id: str, data: Mapping[str, Any], *, licence: str | None) -> str:
    """The README of a set.

    Args:
        repo_id: Where it will lie.
        data: The set, as `FeatureSet.to_dict` gives it.
        licence: Identifier of the licence of the set's own figures, or None.
    """
    from huggingface_hub import ModelCardData

    features: Sequence[Mapping[str, Any]] = data["features"]
    model = data.get("model")
    metadata = ModelCardData(
        base_model=model if model and _HUB_ID.fullmatch(model) else None,
        license=licence,
        tags=["qscope_trl", "sparse-autoencoder", "interpretability"],
    )
    labels = [f"{code(data[key])} ({what})" for key, what in (("model", "model"), ("sae", "SAEs")) if data.get(key)]
    revision = f", revision {code(data['sae_revision'])}" if data.get("sae_revision") else ""
    evidence = sorted({key for feature in features for key in feature.get("evidence", {})})[:4]
    rows = [
        [
            f"L{feature['layer']}F{feature['index']}",
            cell(str(feature.get("label", ""))) or "-",
            f"{feature.get('weight', 1.0):g}",
            f"{feature.get('threshold', 0.0):.4g}",
            *(f"{feature['evidence'][key]:.4g}" if key in feature.get("evidence", {}) else "-" for key in evidence),
        ]
        for feature in features[:_MOST]
    ]
    more = f"\n\nand {len(features) - _MOST} more, in `{FEATURES_FILE}`." if len(features) > _MOST else ""
    origin = "".join(f"- {cell(str(key))}: {cell(str(value))}\n" for key, value in (data.get("origin") or {}).items())
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# Features: {cell(repo_id)}",
        f"{len(features)} features of sparse autoencoders, chosen with [qscope_trl]({_ADDRESS}): "
        f"{' and '.join(labels) or 'origin not stated'}{revision}.",
        table(["feature", "stands for", "weight", "threshold", *evidence], rows) + more,
        "## Use",
        "```python\n"
        "from qscope_trl import FeatureSet, SAEPenaltyCallback\n\n"
        f'features = FeatureSet.from_hub("{repo_id}")\n'
        f"callback = SAEPenaltyCallback({json.dumps(data.get('sae') or 'OWNER/SAES')}, features, penalty_weight=0.1)\n"
        "```",
        f"## How they were chosen\n\n{origin}" if origin else "",
        "A feature stands for what it was chosen on, no more: check it on your own texts before you train on it, and "
        "keep others as monitors.",
        f"## Licence\n\n{LICENCE}",
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already, see `cell`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text of any origin as Markdown: no markup, no line break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text of any origin as code in Markdown, where nothing else is markup, not even a backslash."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".") + "."
