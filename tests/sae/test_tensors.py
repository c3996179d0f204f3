from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qscope_trl.errors import CheckpointError
from qscope_trl.sae import tensors
from qscope_trl.sae.tensors import StoredMatrix, open_tensors


class Payload:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def write(path: Path, content: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("has_feature_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_and_copy_equal_the_stored_values_whichever_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_feature_rows: bool, dtype: torch.dtype
) -> None:
    # Spans of three rows, so that every reading crosses several and the last one is partial.
    monkeypatch.setattr(tensors, "_SPAN_BYTES", 3 * 4 * (5 if has_feature_rows else 37))
    monkeypatch.setattr(tensors, "_SPAN_ROWS", 2)
    values = torch.randn(37, 5).to(dtype)
    path = write(tmp_path / name, {"W": values if has_feature_rows else values.T.contiguous()})
    matrix = StoredMatrix(path, "W", tuple(open_tensors(path).shapes["W"]), has_feature_rows=has_feature_rows)
    assert matrix.shape == (37, 5)
    for index in ([0, 36, 7, 7], [5]):
        assert torch.equal(matrix.features(index), values[index])
    assert matrix.features([]).shape == (0, 5)
    out = torch.empty(37, 5)
    matrix.copy_to(out)
    assert torch.equal(out, values.float())


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_vectors_outlive_the_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {"b": torch.arange(5.0)})
    vector = open_tensors(path).vector("b")
    path.write_bytes(b"")
    assert torch.equal(vector, torch.arange(5.0))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path / name, {"W": torch.randn(100, 100)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"bytes\) is cut short .*Fetch it again"):
        open_tensors(path)


def test_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "a.pt"
    torch.save({"W_enc": Payload(trap)}, path)
    with pytest.raises(CheckpointError, match="holds Python objects other than tensors and was refused"):
        open_tensors(path)
    assert not trap.exists()
    # The trap works: without `weights_only` the file would have been created.
    torch.load(path, weights_only=False)
    assert trap.exists()


def test_old_torch_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"W": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"write it anew: `torch.save\(torch.load\(path, weights_only=True\)"):
        open_tensors(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert open_tensors(path).shapes == {"W": (2,)}


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights"):
            open_tensors(tmp_path / name)


def test_anything_but_a_dict_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a list, expected a dict of tensors"):
        open_tensors(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        open_tensors(tmp_path / "b.safetensors")


def test_absent_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read '.*a.pt': No such file"):
        open_tensors(tmp_path / "a.pt")
