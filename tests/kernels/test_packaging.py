"""Who may import what: the kernels stand alone, and the mathematics loads no language-model library; docstrings."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = sorted(p.stem for p in (ROOT / "klq_edu" / "core").glob("*.py"))


def import_without(blocked, modules, tmp_path):
    """Import `modules` in a fresh interpreter, outside the repository, where importing `blocked` fails."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))"  # None makes `import name` raise
    code = f"{block}; import {', '.join(modules)}"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)


def test_kernels_is_a_bare_source_root():
    """transformers imports whatever answers to the name `kernels`; as a package this would be mistaken for it."""
    assert (ROOT / "kernels" / "klq_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_klq_kernels_needs_neither_klq_edu_nor_transformers(tmp_path):
    done = import_without(["klq_edu", "transformers"], ["klq_kernels", "klq_kernels.reference"], tmp_path)
    assert done.returncode == 0, done.stderr


SHAPE = r"\[[^\]]*(\b(N|V|B|T|H|n|v|k|rows|ROWS)\b|\.\.\.)[^\]]*\]|[Oo]f any shape|of one shape|of x's shape"
SOURCE = r"arXiv \d{4}\.\d{5}|[A-Z]\w+ (and [A-Z]\w+ |et al\. )?(19|20)\d\d\b|\W\(\d\d?\)|[Ss]ource:|eqs?\. \(\d"


def test_public_functions_say_their_shapes_and_sources():
    """Of every module's functions without an underscore, jitted ones too: 80 % a shape, 60 % an equation or a paper."""
    docs = [
        " ".join((ast.get_docstring(node) or "").split())
        for path in (ROOT / "kernels" / "klq_kernels").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert len(docs) > 50 and all(docs)
    assert sum(bool(re.search(SHAPE, doc)) for doc in docs) >= 0.8 * len(docs)
    assert sum(bool(re.search(SOURCE, doc)) for doc in docs) >= 0.6 * len(docs)


def test_core_imports_no_transformers(tmp_path):
    modules = ["klq_edu.core" if name == "__init__" else f"klq_edu.core.{name}" for name in CORE]
    assert "klq_edu.core.tree" in modules
    done = import_without(["transformers", "datasets", "accelerate"], modules, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_import_block_works(tmp_path):
    """The two tests above could not fail if blocking a module did nothing."""
    done = import_without(["torch"], ["klq_kernels"], tmp_path)
    assert done.returncode != 0 and "torch" in done.stderr
