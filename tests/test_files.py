"""Text files are written whole or not at all; YAML that is no mapping is refused with what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output, read_yaml_mapping, write_whole


def test_a_file_is_written_with_its_folder_and_the_usual_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a.json", "ä\n")
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == "ä\n"
    (tmp_path / "new" / "plain").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "new").iterdir()}
    assert len(modes) == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "a.json", "old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_whole(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"No thing at '.*a\.yaml'. Examples are in `there/`"),
        ("a: [", r"a\.yaml' is not YAML"),
        ("- 1", r"a\.yaml' holds a list, not a mapping from setting to value. Examples are in `there/`"),
        ("1: 2", r"a\.yaml' holds a dict, not a mapping from setting to value"),
    ],
)
def test_what_is_no_mapping_of_names_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml_mapping(tmp_path / "a.yaml", what="thing", examples="there/")


def test_outputs_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for good in (None, "", "new.json", str(tmp_path / "file"), str(tmp_path / "new" / "deep" / "a.json")):
        check_output("json", good)
    for good in (str(tmp_path / "folder"), str(tmp_path / "new" / "deep"), "new"):
        check_output("output", good, is_folder=True)
    with pytest.raises(ConfigError, match=r"`json` is '.*folder', which is a folder. Name a file in it"):
        check_output("json", str(tmp_path / "folder"))
    for below in ("file/a.json", "file/deep/a.json"):
        with pytest.raises(ConfigError, match=rf"`json` is '.*{below}', but '.*file' is no folder, so nothing can"):
            check_output("json", str(tmp_path / below))
    with pytest.raises(ConfigError, match=r"`output` is '.*file', which is a file; it is a folder to make"):
        check_output("output", str(tmp_path / "file"), is_folder=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"`json` is '.*a\.json', but '.*folder' may not be written to"):
        check_output("json", str(tmp_path / "folder" / "a.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
