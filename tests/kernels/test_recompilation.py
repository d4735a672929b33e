"""No kernel is compiled anew for another vocabulary, batch, length or temperature: sizes are run-time arguments.

Triton compiles a kernel once per value of its constexpr parameters, per dtype, and per class of every integer: 1, a
multiple of 16, or neither. The tests below ask Triton for the very key under which it would look up a compiled kernel.
"""

import inspect
import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytest.importorskip("triton")

KERNELS = {
    "stats_kernel", "merge_kernel", "grad_kernel", "returns_kernel", "linear_stats_kernel", "token_logits_kernel",
}  # fmt: skip
FLAGS = {"SHARED", "IN_ROWS", "EXACT", "PRECISION", "UPCAST", "DESCRIPTORS"}  # and HAS_…
BLOCKS = {"BLOCK", "SPLITS", "ROWS", "VOCAB", "HIDDEN", "PARTS", "GROUP"}

# Runs the host code of every operation on meta tensors and, in place of each launch, notes the kernel's key.
RECORDER = """
import functools, json, os, random, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from klq_kernels import lambda_returns, torch_linear, triton_linear, triton_logits
from klq_kernels.types import Head, Upstream

backend, sweep, notes = make_backend(GPUTarget("cuda", 90, 32)), None, []

@functools.cache
def binder(kernel):
    return jit.create_function_from_signature(kernel.signature, kernel.params, backend)

def run(self, *args, grid, warmup, **kwargs):
    bound, specialization, options = binder(self)(*args, **kwargs)
    key = jit.compute_cache_key({}, specialization, options)
    constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
    numbers = {k: x.data_ptr() if isinstance(x, torch.Tensor) else x for k, x in bound.items() if k not in constants}
    free = {p.name for p in self.params if p.do_not_specialize}
    numbers = {k: x for k, x in numbers.items() if type(x) is int and k not in free}
    notes.append(dict(sweep=sweep, kernel=self.__name__, key=key, constants=constants, integers=numbers))

jit.JITFunction.run = run
triton_linear.capability, triton_linear.multiprocessors = lambda device: "sm_90", lambda device: 132
torch_linear.every_row = lambda mask: True  # as on a GPU: meta tensors have no contents to count
empty = lambda *shape: torch.empty(shape, device="meta")

def logits(B, T, V, temperature):
    z, r, mask, tokens = empty(B, T, V), empty(B, T, V), empty(B * T).bool(), empty(B * T).long()
    stats = triton_logits.logits_stats(z, tokens, r, temperature, mask)
    triton_logits.logits_grad(z, tokens, r, temperature, mask, stats, Upstream(*[empty(B * T)] * 3), empty(B * T, V))

def hidden(N, V, D, temperature, workspace=1 << 26):
    policy, ref = Head(empty(N, D), empty(V, D), None), Head(empty(N, 2 * D), empty(V, 2 * D), None)
    mask, tokens = empty(N).bool(), empty(N).long()
    stats = triton_linear.linear_stats(policy, tokens, ref, temperature, mask, workspace)
    needed, upstream = (True, True, False), Upstream(*[empty(N)] * 3)
    torch_linear.linear_grad(triton_logits, policy, tokens, ref, temperature, mask, stats, upstream, needed, workspace)

def returns(B, T, *coefficients):
    triton_logits.lambda_returns(*[empty(B, T)] * 4, empty(B, T).bool(), None, *coefficients)

tiles = dict(tile=triton_logits.STATS_BLOCK, scan=triton_logits.SCAN_BLOCK)
widest = max(tiles["tile"], triton_logits.GRAD_BLOCK)
random.seed(0)
sweep = "temperature"
for temperature in (0.3, 0.7, 1.0, 2, 1):
    logits(4, 8, 5000, temperature), hidden(32, 5000, 64, temperature)
os.environ["TRITON_INTERPRET"] = "1"  # only now, so that the public operation accepts the CPU: integers stay floats
for tau, rest in ((0.1, 1), (1, 1), (2.0, 0.5), (1, 1.0)):
    x = torch.zeros(4, 8)
    lambda_returns(x, x, x, x, x == 0, tau=tau, gamma=rest, lam=rest, alpha=rest, backend="triton")
sweep = "vocabulary"
for V in (widest, widest + 3, 32000, 32003, 50257, 65536, 128256, 151936, 262144):
    logits(3, 5, V, 1.0), hidden(15, V, 64, 1.0)
sweep = "small vocabulary"
for V in (1, 2, 15, 16, 17, 100, 512, 1000, 3000):
    logits(3, 5, V, 1.0), hidden(15, V, 64, 1.0)
sweep = "batch"
for _ in range(100):
    B, T = random.randint(1, 64), random.randint(1, 512)
    logits(B, T, 32000, 0.7), hidden(B * T, 32000, 768, 0.7), returns(B, T, 0.1, 1.0, 0.95, 1.0)
sweep = "time"
for T in (*range(1, 40), 1024, 1025, 2048, 4000, 10000):
    returns(3, T, 0.1, 1.0, 0.95, 1.0)
sweep = "hidden"
for D in (1, 7, 64, 100, 768, 1000, 4096):
    hidden(15, 5000, D, 1.0)
sweep = "workspace"
for workspace in (10**5, 10**6, 10**7, 10**8):
    hidden(15, 32000, 64, 1.0, workspace)
json.dump(dict(notes=notes, **tiles), sys.stdout)
"""


@pytest.fixture(scope="module")
def recorded():
    """All launches of the sweeps, from a process that doesn't interpret the kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", RECORDER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launches(recorded, *sweeps):
    """kernel -> its launches in these sweeps (all if none is named)."""
    by_kernel = defaultdict(list)
    for note in recorded["notes"]:
        if not sweeps or note["sweep"] in sweeps:
            by_kernel[note["kernel"]].append(note)
    return by_kernel


def keys(notes):
    return {note["key"] for note in notes}


def constants(notes, name):
    return {note["constants"][name] for note in notes if name in note["constants"]}


def integer_class(x):
    return "1" if x == 1 else "16" if x % 16 == 0 else ""


def classes(notes):
    """What a key may depend on: compile-time constants, and the class of every integer and every address."""
    return {
        (*note["constants"].items(), *((n, integer_class(x)) for n, x in note["integers"].items())) for note in notes
    }


def launched_kernels():
    from klq_kernels import triton_linear, triton_logits

    found = {**vars(triton_logits), **vars(triton_linear)}
    return {name: kernel.fn for name, kernel in found.items() if name.endswith("_kernel")}


def test_every_kernel_is_known_here():
    assert launched_kernels().keys() == KERNELS


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_compile_time_constants_are_flags_and_block_sizes(name):
    parameters = inspect.signature(launched_kernels()[name]).parameters.values()
    constant = {p.name for p in parameters if "constexpr" in str(p.annotation)}
    assert constant and {x for x in constant if not x.startswith("HAS_")} <= FLAGS | BLOCKS


def test_the_sweeps_launch_every_kernel(recorded):
    assert launches(recorded).keys() == KERNELS
    assert launches(recorded, "batch").keys() == KERNELS


def test_temperature_and_coefficients_compile_nothing(recorded):
    """Whole numbers included: an integer 1 would be a compile-time constant."""
    for kernel, notes in launches(recorded, "temperature").items():
        times = len(notes) // (4 if kernel == "returns_kernel" else 5)
        one, *others = (keys(notes[i : i + times]) for i in range(0, len(notes), times))
        assert others and all(other == one for other in others), kernel


def test_a_kernel_depends_on_sizes_only_through_their_classes(recorded):
    """… however many vocabularies, batches, lengths and hidden sizes there are."""
    for kernel, notes in launches(recorded).items():
        assert len(keys(notes)) <= len(classes(notes)), kernel


def test_the_keys_are_those_of_triton(recorded):
    """Guards the tests here: a recorder that dropped something from the key could never fail."""
    for kernel, notes in launches(recorded).items():
        assert len(keys(notes)) == len(classes(notes)) > 1, kernel


def test_block_sizes_are_the_same_for_all_vocabularies_beyond_a_tile(recorded):
    """Not those of the gradient's: a slab of the vocabulary may be narrow."""
    for kernel, notes in launches(recorded, "vocabulary", "batch", "workspace").items():
        for name in BLOCKS - {"SPLITS"} if kernel not in ("returns_kernel", "grad_kernel") else ():
            assert len(constants(notes, name)) <= 1, (kernel, name)


def test_small_vocabularies_and_lengths_get_the_next_power_of_two(recorded):
    small = launches(recorded, "small vocabulary")["stats_kernel"]
    assert constants(small, "BLOCK") == {min(2**i, recorded["tile"]) for i in (4, 5, 7, 9, 10, 12)}
    times = launches(recorded, "time")["returns_kernel"]
    assert constants(times, "BLOCK") == {min(2**i, recorded["scan"]) for i in range(15) if i not in (7, 8, 9)}


def test_splits_are_a_few_powers_of_two(recorded):
    assert constants(launches(recorded)["merge_kernel"], "SPLITS") <= {2**i for i in range(10)}


MOST = dict(
    stats_kernel=3, merge_kernel=24, grad_kernel=16, returns_kernel=20, linear_stats_kernel=1, token_logits_kernel=1
)  # fmt: skip


def test_a_training_run_compiles_each_kernel_a_few_times(recorded):
    """100 batches of random B and T with one model."""
    found = {kernel: len(keys(notes)) for kernel, notes in launches(recorded, "batch").items()}
    assert all(found[kernel] <= most for kernel, most in MOST.items()), found
