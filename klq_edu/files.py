"""Files that are complete or not there, errors that name them and the way out, and where a measurement comes from."""

import json
import os
import shlex
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from klq_edu.machine import facts


@contextmanager
def damage(path: Path):
    """Within this context a ValueError (JSON or UTF-8 that is none) names the file and the way out."""
    try:
        yield
    except ValueError as error:
        way = "restore it from a backup, empty the folder to train from the start, or use another (--out)"
        raise ValueError(f"{path} is damaged ({error}): {way}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty where there is no file; ValueError names a damaged one and the way out."""
    with damage(path):
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    return found


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8", newline="\n"))


def complete_lines(path: Path) -> list[str]:
    """The complete lines of a log: U+2028 and the like end none, and what follows the last newline was cut off."""
    with damage(path):
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def writable_folder(folder: str | Path) -> Path:
    """The folder, created if need be; OSError that says what to do if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {folder} ({error}): choose another with --out") from error
    return folder


def replace_file(path: Path, write) -> None:
    """Write a file so that an interrupt or a power cut leaves the old one or the new one, never half of either."""
    draft = path.with_name(path.name + ".new")
    try:
        write(draft)
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if os.name != "nt":  # Windows can't sync folders
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the system put this file or folder on the disk now."""
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_provenance(csv: Path, device: str, **content) -> None:
    """The JSON beside a CSV that says where it comes from: command, what else there is to say, software, machine."""
    command = {"command": shlex.join(["klq", *sys.argv[1:]])}
    write_json(csv.with_suffix(".json"), command | content | facts(device))
