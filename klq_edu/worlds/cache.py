"""Where models that take a while to make are kept: $KLQ_CACHE, else the user's cache folder."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """$KLQ_CACHE, or klq-edu in $XDG_CACHE_HOME, or ~/.cache/klq-edu."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klq-edu"
    return Path(os.environ.get("KLQ_CACHE") or default)


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(folder)` if it is not there; never left half made."""
    folder = cache_root() / name
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        except OSError as error:
            raise OSError(f"cannot write to the cache {folder.parent} ({error}): set KLQ_CACHE to another") from error
        try:
            make(draft)
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made it first
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder
