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
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from klq_kernels import machine_code, triton_linear, triton_logits

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
LIMITS = {  # shared memory of a block; of a multiprocessor: shared memory, registers, threads (CUDA guide; CDNA 3 ISA)
    "sm_80": (166_912, 167_936, 65_536, 2048), "sm_90": (232_448, 233_472, 65_536, 2048),
    "sm_100": (232_448, 233_472, 65_536, 2048), "gfx942": (65_536, 65_536, 131_072, 2048),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NOT_DIVISIBLE = {"splits", "row_tiles", "blocks"}  # counts; all other integers are taken to be multiples of 16
NARROW = {"token_stats, merge", "linear_token_stats, tokens"}  # move too little for the width of their loads to matter
KINDS = {"TOKENS": "*i64", "MASK": "*i1"} | dict.fromkeys(("inv_temperature", "tau", "gamma", "lam", "alpha"), "fp32")
KINDS |= dict.fromkeys(("V", "T", "D", "D2"), "i32")  # other parameters: *fp32 in capitals, else i32


class Merge(NamedTuple):
    """What `merge_kernel` is compiled for: splits of the vocabulary, of one row."""

    splits: int
    warps: int


@dataclass
class Finding:
    """One compiled kernel. `problems` is empty for a default tile that keeps the package's promises.

    `per_logit`: instructions of a thread per element: outside the k-loop, or of the main loop where nothing is
    multiplied. `work`: of a kernel that multiplies, what a block does per k-step and tile (`klq_edu.bench.roofline`).
    """

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
    per_logit: float
    work: dict[str, float]
    problems: list[str] = field(default_factory=list)


def _variants() -> dict[str, tuple]:
    """name -> (kernel, its element-typed pointers, flags, tiles by element size, models if it multiplies matrices); the
    tiles of those depend on the target too: named is the kind of work."""
    stats, merge, grad, returns = (getattr(triton_logits, f"{n}_kernel") for n in ("stats", "merge", "grad", "returns"))
    linear, tokens = triton_linear.linear_stats_kernel, triton_linear.token_logits_kernel
    logits, head = {"Z", "R"}, {"H", "W", "BIAS", "H2", "W2", "BIAS2"}
    both = dict.fromkeys((2, 4), triton_logits.STATS_TILES)
    token = dict.fromkeys((2, 4), (triton_logits.Tile(triton_linear.TOKEN_BLOCK, 4),))
    one, two = ({"HAS_BIAS": False, "HAS_BIAS2": False, "HAS_REF": ref, "SHARED": False} for ref in (False, True))
    every = {"HAS_A": True, "HAS_B": True, "HAS_C": True}
    merged = {"HAS_REF": True, "HAS_Q": True, "IN_ROWS": True}
    return {
        "token_stats, one model": (stats, logits, {"HAS_REF": False}, both, 0),
        "token_stats": (stats, logits, {"HAS_REF": True}, both, 0),
        "token_stats, merge": (merge, logits, merged, dict.fromkeys((2, 4), (Merge(8, 1),)), 0),
        "token_stats, gradient": (grad, logits | {"OUT"}, every, both, 0),
        "KLQ loss, gradient": (grad, logits | {"OUT"}, every | {"HAS_B": False, "HAS_C": False}, both, 0),
        "lambda_returns": (returns, set(), {"HAS_WEIGHTS": False}, {4: triton_logits.SCAN_TILES}, 0),
        "linear_token_stats, one model": (linear, head, one, "one", 1),
        "linear_token_stats, shared head": (linear, head, two | {"SHARED": True}, "shared", 2),
        "linear_token_stats": (linear, head, two, "two", 2),
        "linear_token_stats, tokens": (tokens, head, {k: on for k, on in two.items() if k != "SHARED"}, token, 0),
    }


def _tiles(name: str, target: str, dtype: str) -> list:
    """The default tile of a kernel, then candidates."""
    tiles = _variants()[name][3]
    if isinstance(tiles, str):
        return [triton_linear.tile(target, DTYPES[dtype], tiles)]
    return list(tiles.get(DTYPES[dtype].itemsize, ()))


def _examine(name: str, target: str, dtype: str, tile, default: bool, ones: bool) -> tuple[Finding, dict[str, str]]:
    """Compile one variant and read its machine code; also the sources (ptx, sass or amdgcn)."""
    kernel, typed, flags, _, models = _variants()[name]
    constants = {flag: on or (ones and flag.startswith("HAS_")) for flag, on in flags.items()}
    sizes, options = _sizes_and_options(tile)
    exact = triton_linear.fp32_precision(TARGETS[target].backend)
    constants |= {name.upper(): size for name, size in sizes.items()}
    constants |= {"PRECISION": exact, "UPCAST": False, "GROUP": triton_linear.GROUP} if models else {}
    types = dict.fromkeys(typed, f"*{dtype}")
    if sizes.get("descriptors"):
        operands = {"H": "rows", "W": "vocab", "H2": "rows", "W2": "vocab"}
        types |= {x: f"tensordesc<{dtype}[{sizes[n]}, {sizes['hidden']}]>" for x, n in operands.items()}
    precision = "-" if not models else dtype if dtype == "bf16" else exact
    compiled = _compile(kernel, types, constants, TARGETS[target], options, ones)
    facts, sources = (_read_amd if target.startswith("gfx") else _read_nvidia)(compiled)
    threads, shared = TARGETS[target].warp_size * compiled.metadata.num_warps, compiled.metadata.shared
    rows, columns = sizes.get("rows", 1), sizes.get("vocab") or sizes.get("block", 1)
    work = machine_code.work(sources.get("sass") or sources["amdgcn"], threads, rows, columns)
    per_logit = work["tile_instructions"] * threads / (rows * columns)
    if models:
        work |= sizes | {"threads": threads, "models": models, "together": 2 if flags["SHARED"] else 1}
        work |= {"size": DTYPES[dtype].itemsize, "group": triton_linear.GROUP}
        work["blocks"] = _blocks(target, facts["registers"], shared, threads)
    finding = Finding(
        kernel=name, target=target, dtype=dtype, tile=_label(tile), default=default, shared_bytes=shared,
        shared_limit=LIMITS[target][0], precision=precision, per_logit=round(per_logit, 2), work=work, **facts,
    )  # fmt: skip
    if default:
        finding.problems = problems(finding, models > 0, wide=name not in NARROW)
    return finding, sources


def _blocks(target: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds; registers come by eights, shared memory with 1 KiB of overhead."""
    _, memory, bank, most = LIMITS[target]
    return min(bank // (-(-registers // 8) * 8 * threads), memory // (shared + memory % 65_536 // 32), most // threads)


def problems(f: Finding, multiplies: bool, wide: bool = True) -> list[str]:
    """What a default tile [rows, vocab] must not do."""
    needs = f"needs {f.shared_bytes} bytes of shared memory, {f.target} has {f.shared_limit}"
    spills = f"spills {f.spill_bytes} bytes, {f.local_accesses} accesses to local memory"
    found = {spills: f.spill_bytes or f.local_accesses, needs: f.shared_bytes > f.shared_limit}
    found |= {"no 16-byte loads": wide and "16" not in f.loads, "no matrix instructions": multiplies and not f.matrix}
    return [problem for problem, there in found.items() if there]


def _compile(kernel, types: dict[str, str], constants: dict, target: GPUTarget, options: dict, ones: bool):
    """Compile with all pointers and sizes divisible by 16, the class that large vocabularies fall into; or with all
    `ones`, since Triton compiles a size of 1 as a constant. What it is told not to specialise is neither."""
    signature = {p.name: KINDS.get(p.name, "*fp32" if p.name.isupper() else "i32") for p in kernel.params} | types
    special = {p.name for p in kernel.params if not p.do_not_specialize} - NOT_DIVISIBLE
    sizes = {name for name in special if signature[name] == "i32" and name not in constants}
    constants = constants | (dict.fromkeys(sizes, 1) if ones else {})
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name in special)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def _read_nvidia(compiled) -> tuple[dict, dict[str, str]]:
    """Registers and local memory (spills) of a thread, and instructions from the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        sass, usage = _run("nvdisasm", "-c", cubin), _run("cuobjdump", "--dump-resource-usage", cubin)
    widths = {"": 4, ".64": 8, ".128": 16, ".U16": 2, ".U8": 1}
    loads = [widths[w] for w in re.findall(r"\bLDG\.E(?:\.\w+)*?(\.64|\.128|\.U16|\.U8)?\b", sass)]
    loads += [16 for _ in re.findall(r"LDGSTS\.E[.\w]*\.128|UTMALDG", sass)]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    facts = dict(
        registers=registers, spill_bytes=stack, local_accesses=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        loads=_counts(loads), stores=_counts(widths[w] for w in re.findall(r"\bSTG\.E(\.64|\.128|\.U16|\.U8)?", sass)),
        matrix=dict(Counter(machine_code.MATRIX.findall(sass))),
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
        stores=_counts(stores), matrix=dict(Counter(machine_code.MATRIX.findall(code))),
    )  # fmt: skip
    return facts, {"amdgcn": code}


def _counts(widths: Iterable[int]) -> dict[str, int]:
    """How many accesses of each width in bytes, the widest first."""
    return {str(width): count for width, count in sorted(Counter(widths).items(), reverse=True)}


def _run(tool: str, *options) -> str:
    out = subprocess.run([TOOLS / tool, *options], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{tool} failed: {out.stderr.strip()[:300]}")
    return out.stdout


def _label(tile) -> str:
    """Sizes and warps of a tile, as a table shows them.

    >>> _label(triton_linear.MatmulTile(128, 256, 64, 8, 3, descriptors=True, parts=2))
    '128×256×64, 8 warps, 3 stages, descriptors, 2 parts'
    """
    sizes, options = _sizes_and_options(tile)
    loads, parts = sizes.pop("descriptors", False), sizes.pop("parts", 1)
    label = ["×".join(map(str, sizes.values())), *(f"{n} {name[4:]}" for name, n in options.items())]
    return ", ".join(label + ["descriptors"] * bool(loads) + [f"{parts} parts"] * (parts > 1))


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
    parser.add_argument(
        "--tile", nargs="+", type=int, help="judge this tile in place of the default: its sizes, warps …"
    )
    parser.add_argument("--ones", action="store_true", help="make every size 1, which Triton compiles differently")
    parser.add_argument("--source", choices=("ptx", "sass", "amdgcn"))
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    for name, target, dtype in itertools.product(args.kernels, args.targets, args.dtypes):
        tiles = _tiles(name, target, dtype)
        tiles = [type(tile)(*args.tile) for tile in tiles[:1]] if args.tile else tiles
        for tile in tiles if args.all_tiles else tiles[:1]:
            finding, sources = _examine(name, target, dtype, tile, tile is tiles[0], args.ones)
            if args.source:
                print(sources.get(args.source, f"{target} has no {args.source}, only {', '.join(sources)}"))
            else:
                print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
