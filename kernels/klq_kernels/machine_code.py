"""What a kernel does in each turn of its loops, from its disassembly (NVIDIA SASS or AMD GCN).

The k-loop is the innermost loop around matrix instructions; the loop around it goes over tiles of logits, and of that
what is jumped over doesn't count, as only a ragged tile needs it. An AMD wave's scalar, memory and vector instructions
are issued side by side: there only the vector instructions count.
"""

import re

INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]{4,}\*/)?\s*((?:@!?\w+ +)?[A-Za-z].*?)\s*(?:;.*)?$")
JUMP = re.compile(r"(?:\bBRA\b|\bCALL\.REL|\bs_c?branch).*?(\.L\w+)")
MATRIX = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTC[HQ]MMA|v_mfma)[.\w]*")
SIZES = re.compile(r"HMMA\.(16)(8)(16|8)\b|(\d+)x(\d+)x(\d+)")
SHARED_LOAD = re.compile(r"(?:@!?U?P\d +)?(?:LDSM?\b(?:\.\w+)*?(?:\.(\d+))?(?=\s)|ds_read(2?)\w*_b(\d+))")
WIDTH = {"2": 8, "4": 16, "64": 8, "128": 16}  # bytes per thread of LDSM.16.M88.2 and .4, LDS.64 and .128; others: 4
COUNTED = {"exponentials": re.compile(r"\bMUFU\.EX2|\bv_exp_"), "barriers": re.compile(r"\bBAR\.SYNC|\bs_barrier")}


def _parse(text: str) -> tuple[list[str], list[int]]:
    """A disassembly's instructions up to its last exit (behind it wait the loops on barriers), and where each may jump
    to: the next, if nowhere."""
    code, labels, end = [], {}, 0
    for line in text.splitlines():
        if label := re.match(r"([.$\w]+):", line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(found[1])
            end = len(code) if found[1] in ("EXIT", "s_endpgm") else end
    jumps = [(i, JUMP.search(instruction)) for i, instruction in enumerate(code[:end])]
    return code[:end], [labels.get(jump[1], i + 1) if jump else i + 1 for i, jump in jumps]


def _loops(jumps: list[int], inside: list[int]) -> tuple[list[range], range | None]:
    """(the innermost loops around these instructions, the loop around those); without any, the longest loop."""
    last = {j: i for i, j in enumerate(jumps) if j <= i}  # jump back to each start
    found = sorted((range(j, i + 1) for j, i in last.items()), key=len)
    around = {next((loop for loop in found if i in loop), range(0)) for i in inside} - {range(0)}
    inner = [a for a in around if not any(b != a and b.start in a and b[-1] in a for b in around)]
    outer = [loop for loop in found if inner and all(i.start in loop and i[-1] in loop and i != loop for i in inner)]
    return inner, next(iter(outer if inner else found[::-1]), None)


def _shortest(jumps: list[int], outer: range, inner: list[range]) -> list[int]:
    """The instructions of one turn outside the inner loops: every jump is taken that misses none of them."""
    i, way, ends = outer.start, [], {loop.start: loop.stop for loop in inner}
    while i in outer:
        if i in ends:
            i = ends[i]
            continue
        way.append(i)
        goal = outer.stop if jumps[i] == outer.start else jumps[i]
        i = i + 1 if goal <= i or goal > outer.stop or any(i < start < goal for start in ends) else goal
    return way


def work(text: str, threads: int, rows: int, vocab: int) -> dict[str, float]:
    """What a block does: per k-step instructions of a thread, matrix instructions, multiply-adds and bytes read from
    shared memory; per tile [rows, vocab] outside of it instructions and exponentials of a thread, and barriers. Without
    matrix instructions a tile is a turn of the longest loop (or all of the code, if there is none). Source: lists of
    instructions of NVIDIA's binary utilities and of AMD's CDNA 3 manual."""
    code, jumps = _parse(text)
    inner, outer = _loops(jumps, [i for i, instruction in enumerate(code) if MATRIX.search(instruction)])
    outside = [code[i] for i in _shortest(jumps, outer, inner)] if outer else code
    step = [code[i] for loop in inner for i in loop]
    products = [_product(instruction, threads, rows, vocab) for instruction in step]
    found = {"step_instructions": _issued(step) / max(1, len(inner)), "tile_instructions": _issued(outside)}
    for i, name in enumerate(("step_matrix", "step_fma", "step_shared")):
        found[name] = sum(product[i] for product in products) / max(1, len(inner))
    return found | {name: len(list(filter(kind.search, outside))) for name, kind in COUNTED.items()}


def _issued(code: list[str]) -> int:
    """Instructions that share the scheduler's slots."""
    return len([i for i in code if i.startswith("v_")] or [i for i in code if i != "NOP"])


def _product(instruction: str, threads: int, rows: int, vocab: int) -> tuple[int, int, int]:
    """(whether it multiplies, multiply-adds, bytes read from shared memory) of a block that executes it."""
    if not (found := MATRIX.search(instruction)):
        width, two, bits = load.groups() if (load := SHARED_LOAD.match(instruction)) else (None, None, "0")
        return 0, 0, threads * (int(bits) // (4 if two else 8) if bits else WIDTH.get(width, 4))
    if found[0].startswith("UTC"):  # one for the block; the code doesn't say how large: as large as the tile allows
        m, n = min(rows, 128), min(vocab, 256)
        return 1, m * n * 16, 32 * (m + n)
    m, n, k = (int(size) for size in SIZES.search(found[0]).groups() if size)
    if "GMMA" in found[0]:  # of four warps; k × bytes per element is 32 in bf16 and in TF32
        read = 32 * (n + m * bool(re.search(r"GMMA\S+ R\d+, gdesc", instruction)))
        return 1, threads // 128 * m * n * k, threads // 128 * read
    return 1, threads // (64 if found[0].startswith("v_") else 32) * m * n * k, 0
