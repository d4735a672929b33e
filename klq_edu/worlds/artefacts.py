"""Artefacts of a long road: each stage makes one folder, complete or not there, that says what it was made of.

manifest.json   what went in (settings, digests, seed), how long it took, with which software, and a digest of each file
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from klq_edu.files import read_json, write_json
from klq_edu.machine import facts
from klq_edu.rlhf.identity import fingerprint
from klq_edu.worlds.weights import cache_root, cached_folder

MANIFEST = "manifest.json"


def artefact(name: str, inputs: dict[str, str | float], make: Callable[[Path], None], *, again: bool = False) -> Path:
    """The folder `name` of the cache as make(folder) leaves it, made unless it is there, whole and of these inputs.

    What is damaged or was made of something else is named and made anew, and so it is with `again`. An interrupted
    stage leaves nothing behind: it starts afresh. Of several processes one makes it and the others wait.
    """
    folder = cache_root() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        reason = "to be made anew" if again else outdated(folder, inputs)
        if reason is None:
            return folder
        print(f"{name}: {reason}", flush=True)
        for leftover in [folder, *folder.parent.glob(f".{folder.name}-*")]:  # of a stage that was killed
            shutil.rmtree(leftover, ignore_errors=True)

        def made(draft: Path) -> None:
            start = time.perf_counter()
            make(draft)
            seconds = round(time.perf_counter() - start, 1)
            files = {p.relative_to(draft).as_posix(): digest(p) for p in sorted(draft.rglob("*")) if p.is_file()}
            write_json(draft / MANIFEST, {"inputs": inputs, "seconds": seconds, "files": files} | facts("cpu"))

        return cached_folder(name, made)


def outdated(folder: Path, inputs: dict) -> str | None:
    """Why this artefact has to be made; None if it is whole and of these inputs."""
    if not folder.exists():
        return "not there yet"
    try:
        manifest = read_json(folder / MANIFEST)
        found, files = manifest["inputs"], manifest["files"]
    except (ValueError, KeyError):
        return f"damaged ({MANIFEST} can't be read)"
    for name, known in files.items():
        if not (folder / name).is_file() or digest(folder / name) != known:
            return f"damaged ({name} is not as it was written)"
    differ = [k for k in found | inputs if found.get(k) != inputs.get(k)]
    return f"made of something else ({', '.join(differ)} changed)" if differ else None


def contents(folder: Path) -> str:
    """Digest of an artefact's files: the same where it was made anew with the same result."""
    return fingerprint(read_json(folder / MANIFEST)["files"])


def digest(path: Path) -> str:
    """16 hexadecimal digits of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
