"""What ends a command early: outputs that cannot be written, errors of the system, Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qscope_trl import cli
from qscope_trl.cli import main

# The model is nowhere, so an answer about the output came before it was looked for.
WHERE = ["--model", "./nowhere", "--saes", "./nowhere"]
LABELLED = ["--data", "d.jsonl", "--label-column", "y"]
OUTPUTS = [
    (["find", *WHERE, "--layers", "1", "--positive", "a.txt", "--negative", "b.txt"], "output"),
    (["find", *WHERE, "--layers", "1", "--repetition", "a.txt", "--output", "f.yaml"], "report"),
    (["doctor", *WHERE, "--layers", "1", "--data", "a.txt"], "json"),
    (["doctor", *WHERE, "--layers", "1", "--data", "a.txt"], "report"),
    (["index", *WHERE, "--layers", "1", "--data", "a.txt"], "output"),
    (["rules", "learn", *WHERE, *LABELLED], "output"),
    (["rules", "learn", *WHERE, *LABELLED, "--output", "r.yaml"], "json"),
    (["rules", "evaluate", *WHERE, *LABELLED, "--rule", "L1F2"], "report"),
    (["rules", "explain", *WHERE, "--text", "a", "--rule", "L1F2"], "report"),
    (["rules", "check", "--rule", "L1F2"], "output"),
    (["curate", "--data", "a.txt"], "output"),
    (["synthesize", *WHERE, "--features", "f.yaml", "--data", "a.txt"], "output"),
    (["steer", *WHERE, "--features", "L1F2", "--prompt", "a"], "json"),
    (["steer", *WHERE, "--features", "L1F2", "--prompt", "a"], "report"),
]


@pytest.mark.parametrize(("argv", "setting"), OUTPUTS, ids=[f"{argv[0]}-{name}" for argv, name in OUTPUTS])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    argv: list[str], setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "deep" / "out.yaml"
    assert main([*argv, f"--{setting}", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: `{setting}` is '{path}', but '{tmp_path / 'file'}' is no folder, so nothing can be written there.\n"
    )


def ends_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)


def test_an_error_of_the_system_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_with(monkeypatch, OSError(28, "No space left on device", "a.json"))
    assert main(["find"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'a.json'\n"
    monkeypatch.setenv("QSCOPE_TRL_DEBUG", "1")
    with pytest.raises(OSError, match="No space left"):
        main(["find"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["find"], "interrupted."),
        (["index"], "interrupted. The same command goes on from here."),
        (["synthesize"], "interrupted. The same command goes on from here with `--resume`."),
        ([], "interrupted."),
    ],
)
def test_an_interrupt_is_one_line_and_exit_code_130(
    argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_with(monkeypatch, KeyboardInterrupt())
    assert main(argv) == 130
    # The first line ends that of a progress bar.
    assert capsys.readouterr().err == f"\n{line}\n"
    monkeypatch.setenv("QSCOPE_TRL_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        main(argv)
