"""What several commands do with files: text written whole or not at all, outputs checked, locks, YAML mappings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml

from qscope_trl.errors import ConfigError


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, and rename it. Its folder is made if there is none.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_values(value: Any) -> Any:
    """Mappings, lists and tuples as JSON has them: keys as texts, and null for what is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, such as that of a file just renamed, where folders can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder for this process; the lock ends when it is closed, also by the process's end.

    Returns:
        True if it is held, False if another process holds it, None where there are no locks: on Windows, and on some
        network file systems.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def check_output(setting: str, path: str | None, *, is_folder: bool = False) -> None:
    """Say before the work begins, and not after it, that its output could not be written.

    Args:
        setting: Name of the setting, for messages.
        path: Its value; nothing is checked without one.
        is_folder: Whether it is to be a folder, which may be there already.

    Raises:
        ConfigError: If a file has the folder's name or a folder the file's, or the place cannot be written to.
    """
    if not path:
        return
    if os.path.isdir(path) and not is_folder:
        raise ConfigError(f"`{setting}` is '{path}', which is a folder. Name a file in it.")
    if os.path.isfile(path) and is_folder:
        raise ConfigError(f"`{setting}` is '{path}', which is a file; it is a folder to make.")
    place = Path(path) if is_folder else Path(path).parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise ConfigError(f"`{setting}` is '{path}', but '{place}' is no folder, so nothing can be written there.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"`{setting}` is '{path}', but '{place}' may not be written to.")


def read_yaml_mapping(path: Path, *, what: str, examples: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        what: What it is called in messages, such as `configuration file`.
        examples: Folder with examples, for messages.

    Raises:
        ConfigError: If it is missing, no YAML, or no mapping from names.
    """
    if not path.is_file():
        raise ConfigError(f"No {what} at '{path}'. Examples are in `{examples}`.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"'{path}' is not YAML: {err}") from err
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(
            f"'{path}' holds a {type(data).__name__}, not a mapping from setting to value. Examples are in "
            f"`{examples}`."
        )
    return data
