"""Compile every Triton kernel for GPUs that are not there, and read what the machine code says.

`python -m klq_kernels.offline` prints JSON, one record per kernel × target × dtype × candidate tile. It must run
without TRITON_INTERPRET: one process can't both interpret and compile. `klq inspect` calls it and shows the table.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from klq_kernels import triton_linear, triton_logits

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes per block
DTYPES = {"bf16": 2, "fp32": 4}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NOT_DIVISIBLE = {"splits", "row_tiles", "blocks"}  # counts; all other integers are taken to be multiples of 16
KINDS = {"TOKENS": "*i64", "MASK": "*i1"} | dict.fromkeys(("inv_temperature", "tau", "gamma", "lam", "alpha"), "fp32")
KINDS |= dict.fromkeys(("V", "T", "D", "D2"), "i32")  # other parameters: *fp32 in capitals, else i32


@dataclass
class Finding:
    """One compiled kernel. `problems` is empty for a default tile that keeps the package's promises."""

    kernel: str
    target: str
    dtype: str
    tile: str
    default: bool
    registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    shared_limit: int
    loads: dict[str, int]
    stores: dict[str, int]
    matrix: dict[str, int]
    precision: str
    problems: list[str] = field(default_factory=list)


def _variants() -> dict[str, tuple]:
    """name -> (kernel, its element-typed pointers, flags, tiles by element size, whether it multiplies matrices)."""
    stats, merge, grad, returns = (getattr(triton_logits, f"{n}_kernel") for n in ("stats", "merge", "grad", "returns"))
    head = {"H", "W", "BIAS", "H2", "W2", "BIAS2"}
    linear, linear_grad = triton_linear.linear_stats_kernel, triton_linear.linear_grad_kernel
    both, matmul = dict.fromkeys((2, 4), triton_logits.STATS_TILES), triton_linear.TILES
    scan = {4: triton_logits.SCAN_TILES}
    no_bias = {"HAS_BIAS": False, "HAS_BIAS2": False}
    every = {"HAS_A": True, "HAS_B": True, "HAS_C": True}
    in_rows = {"HAS_REF": True, "IN_ROWS": True, "SPLITS": 8}
    return {
        "token_stats": (stats, {"Z", "R"}, {"HAS_REF": True}, both, False),
        "token_stats, merge": (merge, {"Z", "R"}, in_rows, both, False),
        "token_stats, gradient": (grad, {"Z", "R", "OUT"}, every, both, False),
        "KLQ loss, gradient": (grad, {"Z", "R", "OUT"}, every | {"HAS_B": False, "HAS_C": False}, both, False),
        "lambda_returns": (returns, set(), {"HAS_WEIGHTS": False}, scan, False),
        "linear_token_stats": (linear, head, no_bias | {"HAS_REF": True, "SHARED": False}, matmul, True),
        "linear_token_stats, shared head": (linear, head, no_bias | {"HAS_REF": True, "SHARED": True}, matmul, True),
        "linear_token_stats, gradient": (linear_grad, head | {"OUT"}, no_bias | every, matmul, True),
    }


def _examine(name: str, target: str, dtype: str, tile, default: bool, ones: bool) -> tuple[Finding, dict[str, str]]:
    """Compile one variant and read its machine code; also the sources (ptx, sass or amdgcn)."""
    kernel, typed, flags, _, multiplies = _variants()[name]
    constants = {flag: on or (ones and flag.startswith("HAS_")) for flag, on in flags.items()}
    sizes, options = _sizes_and_options(tile)
    exact = triton_linear.fp32_precision(TARGETS[target].backend)
    constants |= {name.upper(): size for name, size in sizes.items()}
    constants |= {"PRECISION": exact, "UPCAST": False} if multiplies else {}
    precision = "-" if not multiplies else dtype if dtype == "bf16" else exact
    compiled = _compile(kernel, typed, constants, TARGETS[target], dtype, options, ones)
    facts, sources = (_read_amd if target.startswith("gfx") else _read_nvidia)(compiled)
    finding = Finding(
        kernel=name, target=target, dtype=dtype, tile=_label(tile), default=default,
        shared_bytes=compiled.metadata.shared, shared_limit=SHARED_LIMIT[target], precision=precision, **facts,
    )  # fmt: skip
    if default:
        finding.problems = problems(finding, multiplies)
    return finding, sources


def problems(f: Finding, multiplies: bool) -> list[str]:
    """What a default tile must not do."""
    needs = f"needs {f.shared_bytes} bytes of shared memory, {f.target} has {f.shared_limit}"
    spills = f"spills {f.spill_bytes} bytes, {f.local_accesses} accesses to local memory"
    found = {spills: f.spill_bytes or f.local_accesses, needs: f.shared_bytes > f.shared_limit}
    found |= {"no 16-byte loads": "16" not in f.loads, "no matrix instructions": multiplies and not f.matrix}
    return [problem for problem, there in found.items() if there]


def _compile(kernel, typed: set[str], constants: dict, target: GPUTarget, dtype: str, options: dict, ones: bool):
    """Compile with all pointers and sizes divisible by 16, the class that large vocabularies fall into; or with all
    `ones`, since Triton compiles a size of 1 as a constant."""
    kinds = {p.name: KINDS.get(p.name, "*fp32" if p.name.isupper() else "i32") for p in kernel.params}
    signature = kinds | dict.fromkeys(typed, f"*{dtype}")
    if ones:
        constants = constants | {name: 1 for name, kind in signature.items() if kind == "i32" and name not in constants}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in NOT_DIVISIBLE)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def _read_nvidia(compiled) -> tuple[dict, dict[str, str]]:
    """Registers and spills from ptxas, instructions from the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        sass = _run(TOOLS / "nvdisasm", "-c", cubin)
        arch = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
        ptxas = TOOLS / ("ptxas-blackwell" if (TOOLS / "ptxas-blackwell").exists() else "ptxas")
        log = _run(ptxas, "-v", f"--gpu-name={arch}", "-o", Path(folder, "again"), ptx, stderr=True)
    widths = {"": 4, ".64": 8, ".128": 16, ".U16": 2, ".U8": 1}
    loads = [widths[w] for w in re.findall(r"\bLDG\.E(?:\.\w+)*?(\.64|\.128|\.U16|\.U8)?\b", sass)]
    loads += [16 for _ in re.findall(r"LDGSTS\.E[.\w]*\.128|UTMALDG", sass)]
    facts = dict(
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        local_accesses=len(re.findall(r"\b(?:STL|LDL)\b", sass)), loads=_counts(loads),
        stores=_counts(widths[w] for w in re.findall(r"\bSTG\.E(\.64|\.128|\.U16|\.U8)?", sass)),
        matrix=dict(Counter(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)[.\w]*", sass))),
    )  # fmt: skip
    return facts, {"ptx": compiled.asm["ptx"], "sass": sass}


def _read_amd(compiled) -> tuple[dict, dict[str, str]]:
    """The same from the assembly, where the compiler notes registers and spills."""
    code = compiled.asm["amdgcn"]
    widths = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    access = r"(?:global|buffer)_{}_(?:lds_)?(\w+?)(?:_d16\w*)?\b"
    loads, stores = ([widths.get(w, 4) for w in re.findall(access.format(k), code)] for k in ("load", "store"))
    facts = dict(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1)),
        spill_bytes=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code).group(1)),
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", code)), loads=_counts(loads),
        stores=_counts(stores), matrix=dict(Counter(re.findall(r"\bv_mfma\w+", code))),
    )  # fmt: skip
    return facts, {"amdgcn": code}


def _counts(widths: Iterable[int]) -> dict[str, int]:
    """How many accesses of each width in bytes, the widest first."""
    return {str(width): count for width, count in sorted(Counter(widths).items(), reverse=True)}


def _run(*command, stderr: bool = False) -> str:
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {out.stderr.strip()[:300]}")
    return out.stderr + out.stdout if stderr else out.stdout


def _label(tile) -> str:
    """Sizes and warps of a tile, as a table shows them.

    >>> _label(triton_logits.Tile(4096, 8))
    '4096, 8 warps'
    """
    sizes, options = _sizes_and_options(tile)
    return ", ".join(["×".join(map(str, sizes.values())), *(f"{n} {name[4:]}" for name, n in options.items())])


def _sizes_and_options(tile) -> tuple[dict[str, int], dict[str, int]]:
    """A tile's sizes, and Triton's options `num_warps` and `num_stages`."""
    sizes = tile._asdict()
    options = {f"num_{name}": sizes.pop(name) for name in ("warps", "stages") if name in sizes}
    return sizes, options


def main() -> None:
    """Print findings as JSON lines, or one kernel's source."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, known in {"--targets": TARGETS, "--dtypes": DTYPES, "--kernels": _variants()}.items():
        parser.add_argument(option, nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--all-tiles", action="store_true", help="candidate tiles too, not only the defaults")
    parser.add_argument("--ones", action="store_true", help="make every size 1, which Triton compiles differently")
    parser.add_argument("--source", choices=("ptx", "sass", "amdgcn"))
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    for name, target, dtype in itertools.product(args.kernels, args.targets, args.dtypes):
        tiles = _variants()[name][3].get(DTYPES[dtype], [])
        for tile in tiles if args.all_tiles else tiles[:1]:
            finding, sources = _examine(name, target, dtype, tile, tile is tiles[0], args.ones)
            if args.source:
                print(sources.get(args.source, f"{target} has no {args.source}, only {', '.join(sources)}"))
            else:
                print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
