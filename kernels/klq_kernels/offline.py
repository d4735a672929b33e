"""Compile every Triton kernel for GPUs that are not there, and read what the machine code says.

`python -m klq_kernels.offline` prints JSON, one record per kernel × target × dtype. It must run without
TRITON_INTERPRET: one process can't both interpret and compile. `klq inspect` calls it and shows the table.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

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
WIDTHS = {  # bytes of loads and stores; of all others 4
    ".U8": 1, ".U16": 2, ".64": 8, ".128": 16, "ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dwordx2": 8,
    "dwordx4": 16,
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NARROW = {"token_stats, merge", "linear_token_stats, tokens"}  # move too little for the width of their loads to matter
KINDS = {"TOKENS": "*i64", "MASK": "*i1"} | dict.fromkeys(("inv_temperature", "tau", "gamma", "lam", "alpha"), "fp32")
KINDS |= dict.fromkeys(("V", "T", "D", "D2"), "i32")  # other parameters: *fp32 in capitals, else i32


def _variants() -> dict[str, tuple]:
    """name -> (kernel, its element-typed pointers (none: it is only for fp32), flags, tile); the tile of a kernel that
    multiplies matrices depends on the target and the dtype too: named is the kind of work."""
    stats, merge, grad, returns = (getattr(triton_logits, f"{n}_kernel") for n in ("stats", "merge", "grad", "returns"))
    linear, tokens = triton_linear.linear_stats_kernel, triton_linear.token_logits_kernel
    logits, head = {"Z", "R"}, {"H", "W", "BIAS", "H2", "W2", "BIAS2"}
    blocks = triton_logits.STATS_BLOCK, triton_logits.GRAD_BLOCK, triton_logits.SCAN_BLOCK, triton_linear.TOKEN_BLOCK
    row, slab, scan, token = ({"block": block, "warps": 4} for block in blocks)
    one, two = ({"HAS_BIAS": False, "HAS_BIAS2": False, "HAS_REF": ref} for ref in (False, True))
    every = {"HAS_A": True, "HAS_B": True, "HAS_C": True}
    merged = {"HAS_REF": True, "HAS_Q": True, "IN_ROWS": True}
    return {
        "token_stats, one model": (stats, logits, {"HAS_REF": False}, row),
        "token_stats": (stats, logits, {"HAS_REF": True}, row),
        "token_stats, merge": (merge, logits, merged, {"splits": 8, "warps": 1}),
        "token_stats, gradient": (grad, logits | {"OUT"}, every, slab),
        "KLQ loss, gradient": (grad, logits | {"OUT"}, every | {"HAS_B": False, "HAS_C": False}, slab),
        "lambda_returns": (returns, set(), {"HAS_WEIGHTS": False}, scan),
        "linear_token_stats, one model": (linear, head, one | {"SHARED": False}, "one"),
        "linear_token_stats, shared head": (linear, head, two | {"SHARED": True}, "shared"),
        "linear_token_stats": (linear, head, two | {"SHARED": False}, "two"),
        "linear_token_stats, tokens": (tokens, head, two, token),
    }


def _sizes_and_options(tile: dict | str, given: list[int], target: str, dtype: str) -> tuple[dict, dict]:
    """Sizes of the tile that a kernel has, or of a given one, and Triton's options `num_warps` and `num_stages`."""
    if isinstance(tile, str):
        best = triton_linear.MatmulTile(*given) if given else triton_linear.tile(target, DTYPES[dtype], tile)
        sizes = best._asdict()
    else:
        sizes = tile | dict(zip(tile, given, strict=False))
    return sizes, {f"num_{name}": sizes.pop(name) for name in ("warps", "stages") if name in sizes}


def examine(name: str, target: str, dtype: str, given: list[int], ones: bool = False) -> tuple[dict, dict[str, str]]:
    """Compile one variant and read its machine code: its record, and the sources (ptx, sass or amdgcn).

    `problems` is empty for a tile that keeps the package's promises. `per_logit`: instructions of a thread per element:
    outside the k-loop, or of the main loop where nothing is multiplied. `work`: of a kernel that multiplies, what a
    block does per k-step and tile (`klq_edu.bench.roofline`).
    """
    kernel, typed, flags, tile = _variants()[name]
    constants = {flag: on or (ones and flag.startswith("HAS_")) for flag, on in flags.items()}
    sizes, options = _sizes_and_options(tile, given, target, dtype)
    exact = triton_linear.FP32[TARGETS[target].backend]
    models = 0 if isinstance(tile, dict) else 1 if tile == "one" else 2
    constants |= {name.upper(): size for name, size in sizes.items()}
    constants |= {"PRECISION": exact, "UPCAST": False, "GROUP": triton_linear.GROUP} if models else {}
    types = dict.fromkeys(typed, f"*{dtype}")
    if sizes.get("descriptors"):
        operands = {"H": "rows", "W": "vocab", "H2": "rows", "W2": "vocab"}
        types |= {x: f"tensordesc<{dtype}[{sizes[n]}, {sizes['hidden']}]>" for x, n in operands.items()}
    compiled = _compile(kernel, types, constants, TARGETS[target], options, ones)
    facts, sources = _read(compiled)
    threads, shared = TARGETS[target].warp_size * compiled.metadata.num_warps, compiled.metadata.shared
    rows, columns = sizes.get("rows", 1), sizes.get("vocab") or sizes.get("block", 1)
    work = machine_code.work(sources.get("sass") or sources["amdgcn"], threads, rows, columns)
    per_logit = work["tile_instructions"] * threads / (rows * columns)
    if models:
        work |= sizes | {"threads": threads, "models": models, "together": 2 if flags["SHARED"] else 1}
        work |= {"size": DTYPES[dtype].itemsize, "group": triton_linear.GROUP}
        work["blocks"] = _blocks(target, facts["registers"], shared, threads)
    record = dict(
        kernel=name, target=target, dtype=dtype, tile=_label(sizes, options), shared_bytes=shared,
        shared_limit=LIMITS[target][0], precision="-" if not models else dtype if dtype == "bf16" else exact,
        per_logit=round(per_logit, 2), work=work, **facts,
    )  # fmt: skip
    return record | {"problems": problems(**record)}, sources


def _blocks(target: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds; registers come by eights, shared memory with 1 KiB of overhead."""
    _, memory, bank, most = LIMITS[target]
    return min(bank // (-(-registers // 8) * 8 * threads), memory // (shared + memory % 65_536 // 32), most // threads)


def problems(
    kernel: str, target: str, precision: str, matrix: dict, loads: dict, spill_bytes: int, local_accesses: int,
    shared_bytes: int, shared_limit: int, **others,
) -> list[str]:  # fmt: skip
    """What a kernel's tile must not do, of a record's facts."""
    needs = f"needs {shared_bytes} bytes of shared memory, {target} has {shared_limit}"
    spills = f"spills {spill_bytes} bytes, {local_accesses} accesses to local memory"
    found = {spills: spill_bytes or local_accesses, needs: shared_bytes > shared_limit}
    found["no 16-byte loads"] = kernel not in NARROW and "16" not in loads
    found["no matrix instructions"] = precision != "-" and not matrix
    return [problem for problem, there in found.items() if there]


def _compile(kernel, types: dict[str, str], constants: dict, target: GPUTarget, options: dict, ones: bool):
    """Compile with all pointers and sizes divisible by 16, the class that large vocabularies fall into; or with all
    `ones`, since Triton compiles a size of 1 as a constant. What it is told not to specialise is neither."""
    signature = {p.name: KINDS.get(p.name, "*fp32" if p.name.isupper() else "i32") for p in kernel.params} | types
    special = {p.name for p in kernel.params if not p.do_not_specialize}
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


def _read(compiled) -> tuple[dict, dict[str, str]]:
    """Registers, spills and accesses to memory of a thread, and the sources; AMD's assembly has it all as text."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        sources, local = {"amdgcn": code}, r"\bscratch_(?:load|store)"
        registers, words = (int(re.search(rf"\.vgpr_{x}:\s+(\d+)", code)[1]) for x in ("count", "spill_count"))
        access, spilled = r"(?:global|buffer)_{}_(?:lds_)?(\w+?)(?:_d16\w*)?\b", 4 * words
        loads, stores = (re.findall(access.format(kind), code) for kind in ("load", "store"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "k.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            code, usage = _run("nvdisasm", "-c", cubin), _run("cuobjdump", "--dump-resource-usage", cubin)
        sources, local = {"ptx": compiled.asm["ptx"], "sass": code}, r"\b(?:STL|LDL)\b"
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        loads = re.findall(r"\bLDG\.E(?:\.\w+)*?(\.64|\.128|\.U16|\.U8)?\b", code)
        loads += [".128" for _ in re.findall(r"LDGSTS\.E[.\w]*\.128|UTMALDG", code)]
        stores = re.findall(r"\bSTG\.E(\.64|\.128|\.U16|\.U8)?", code)
    facts = dict(
        registers=registers, spill_bytes=spilled, local_accesses=len(re.findall(local, code)), loads=_counts(loads),
        stores=_counts(stores), matrix=dict(Counter(machine_code.MATRIX.findall(code))),
    )  # fmt: skip
    return facts, sources


def _counts(kinds: list[str]) -> dict[str, int]:
    """How many accesses of each width in bytes, the widest first."""
    return {str(n): count for n, count in sorted(Counter(WIDTHS.get(k, 4) for k in kinds).items(), reverse=True)}


def _run(tool: str, *options) -> str:
    out = subprocess.run([TOOLS / tool, *options], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{tool} failed: {out.stderr.strip()[:300]}")
    return out.stdout


def _label(sizes: dict, options: dict) -> str:
    """Such as "128×256×64, 8 warps, 3 stages, descriptors, 2 parts"."""
    lengths = [str(n) for name, n in sizes.items() if name not in ("descriptors", "parts")]
    label = ["×".join(lengths), *(f"{n} {name[4:]}" for name, n in options.items())]
    parts = sizes.get("parts", 1)
    return ", ".join(label + ["descriptors"] * sizes.get("descriptors", False) + [f"{parts} parts"] * (parts > 1))


def main() -> None:
    """Print records as JSON lines, or one kernel's source."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, known in {"--targets": TARGETS, "--dtypes": DTYPES, "--kernels": _variants()}.items():
        parser.add_argument(option, nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--tile", nargs="+", type=int, default=[], help="judge this tile instead: sizes, warps …")
    parser.add_argument("--ones", action="store_true", help="make every size 1, which Triton compiles differently")
    parser.add_argument("--source", choices=("ptx", "sass", "amdgcn"))
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    for name, target, dtype in itertools.product(args.kernels, args.targets, args.dtypes):
        if not _variants()[name][1] and dtype != "fp32":
            continue
        record, sources = examine(name, target, dtype, args.tile, args.ones)
        if args.source:
            print(sources.get(args.source, f"{target} has no {args.source}, only {', '.join(sources)}"))
        else:
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
