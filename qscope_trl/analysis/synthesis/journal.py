"""The journal of a synthesis: every request and answer, one JSON line each.

A line is on the disk before anything follows from it, and the journal is only ever appended to. A process that dies
leaves at most one torn line, the last, which is dropped when the journal is opened again; what was answered before is
never asked again, and what was asked without an answer stays in the account, since it may have been paid.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from qscope_trl.errors import ConfigError, DataError
from qscope_trl.files import sync_folder, try_lock

VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What came back for a request: a text, or the reason that there is none.

    Args:
        text: The text.
        failure: Why there is none: `empty`, `malformed`, `too long`; empty otherwise.
        prompt_tokens: Tokens of the request, as the generator counted them.
        completion_tokens: Tokens of the answer.
    """

    text: str
    failure: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """What encoding a response showed.

    Args:
        activation: Of the feature that was asked for, the largest over the response's tokens; 0 if silent.
        fires: Activations of all target features that fire in it, by name.
        matched: Share of the feature's matched random features that fire in it; `None` without any.
        tokens: Tokens of the response that were read.
    """

    activation: float
    fires: Mapping[str, float]
    matched: float | None
    tokens: int


class Journal:
    """An open journal; `close` it. Safe to append to from several threads, not from several processes: it is locked.

    Args:
        path: The file; made if it is not there.
        settings: What the run is made with; compared with what is recorded.

    Raises:
        ConfigError: If it was made with other settings, or another process has it open.
        DataError: If a line other than the last is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.facts: dict[str, Any] = {}
        self.num_requests = 0
        self.num_tokens = 0
        self.num_retries = 0
        self._open_asks: dict[str, int] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what is written is written, and what is not can be taken back.
        self._file = path.open("ab+", buffering=0)
        self._size = 0
        self._is_broken = False
        try:
            _lock_file(self._file, path)
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file, which gives up the lock."""
        self._file.close()

    def ask(self, requests: Sequence[tuple[str, int]]) -> None:
        """Record that requests are about to be sent.

        Args:
            requests: Key of each, and the tokens it may use at most.
        """
        self._append([{"record": "ask", "key": key, "may_use": may_use} for key, may_use in requests])

    def attempt_failed(self, key: str, error: str, tokens: int) -> None:
        """Record that a request failed for the moment, and the tokens that it may have cost."""
        self._append([{"record": "attempt", "key": key, "error": error, "tokens": tokens}])

    def answer(self, answers: Mapping[str, Answer]) -> None:
        """Record answers."""
        self._append([{"record": "answer", "key": key, **vars(answer)} for key, answer in answers.items()])

    def verdict(self, verdicts: Mapping[str, Verdict]) -> None:
        """Record what encoding responses showed."""
        self._append([{"record": "verdict", "key": key, **vars(verdict)} for key, verdict in verdicts.items()])

    def fact(self, name: str, value: Any) -> None:
        """Record what took work to find out, such as the coverage before."""
        self._append([{"record": "fact", "name": name, "value": value}])

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, wait until they are on the disk, and only then take them in."""
        records = [dict(record) for record in records]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with self._lock:
            self._write(lines.encode("ascii"))
            for record in records:
                self._take(record)

    def _write(self, content: bytes) -> None:
        if self._is_broken:
            raise DataError(f"The journal '{self.path}' could not be written before, so nothing more is asked.")
        try:
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException:
            # Half a line must not be followed by another one.
            self._is_broken = True
            self._file.truncate(self._size)
            self._is_broken = False
            raise
        self._size += len(content)

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        lines = content.split(b"\n")
        whole = 0
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._check_start(record, settings)
                else:
                    self._take(record)
            except (ValueError, KeyError, TypeError) as err:
                if isinstance(err, ConfigError | DataError):
                    raise
                if number == len(lines) - 1 and not lines[-1]:
                    break
                raise DataError(
                    f"Line {number} of the journal '{self.path}' is damaged: {err}. Only its last line may be; take "
                    f"the file from a backup, or start anew with another `--output`."
                ) from err
            whole += len(line) + 1
        if whole < len(content):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())
        self._size = whole
        self.num_tokens += sum(self._open_asks.values())
        self._open_asks.clear()
        if not whole:
            self._append([{"record": "start", "version": VERSION, "settings": dict(settings)}])
            sync_folder(self.path.parent)

    def _check_start(self, record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        if record.get("record") != "start" or record.get("version") != VERSION:
            raise DataError(
                f"'{self.path}' is not a journal of this version of qscope_trl. Choose another `--output`."
            )
        recorded = record["settings"]
        # As they are after writing and reading: a tuple is a list then.
        given = json.loads(json.dumps(dict(settings)))
        differing = [name for name in {**recorded, **given} if recorded.get(name) != given.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"The synthesis in '{self.path.parent}' was started with `{name}` = {recorded.get(name)!r}, and now "
                f"it is {given.get(name)!r}{_and_others(differing)}. Its answers belong to those settings: resume "
                f"with them, or choose another `--output`."
            )

    def _take(self, record: Mapping[str, Any]) -> None:
        kind = record["record"]
        if kind == "start":
            return
        if kind == "ask":
            self.num_requests += 1
            self._open_asks[record["key"]] = record["may_use"]
        elif kind == "attempt":
            self._open_asks.pop(record["key"], None)
            self.num_tokens += record["tokens"]
            self.num_retries += 1
        elif kind == "answer":
            values = {name: record[name] for name in ("text", "failure", "prompt_tokens", "completion_tokens")}
            self._open_asks.pop(record["key"], None)
            self.answers[record["key"]] = Answer(**values)
            self.num_tokens += record["prompt_tokens"] + record["completion_tokens"]
        elif kind == "verdict":
            values = {name: record[name] for name in ("activation", "fires", "matched", "tokens")}
            self.verdicts[record["key"]] = Verdict(**values)
        elif kind == "fact":
            self.facts[record["name"]] = record["value"]
        else:
            raise ValueError(f"it holds a record of the unknown kind {kind!r}")


def _and_others(differing: Sequence[str]) -> str:
    return f"; {', '.join(f'`{name}`' for name in differing[1:])} too" if len(differing) > 1 else ""


def _lock_file(file: FileIO, path: Path) -> None:
    """Lock a file for this process until it is closed; systems without locks go without."""
    if try_lock(file.fileno()) is False:
        raise ConfigError(f"Another process works on '{path.parent}'. Wait for it, or choose another `--output`.")
