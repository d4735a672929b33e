"""What a run was trained on, in digests: the same folder must not answer for another model, prompts or reward."""

import builtins
import copyreg
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.runs import START

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def identity(prompts: Dataset, reward: Callable, policy: ActorCritic | None = None) -> dict[str, str]:
    """Digests of the prompts (all columns and rows, as training sees them), of the reward, and of the policy.

    Of the policy: the frozen reference, the trainable parameters' names and shapes, and their present values but for
    the value head's, which a run sets in its first update.
    """
    rows = list(prompts.iter(1000))
    found = {"prompts": fingerprint([sorted(prompts.column_names), rows]), "reward": reward_identity(reward)}
    if policy is None:
        return found
    tensors, trainable = [*policy.named_parameters(), *policy.named_buffers()], policy.trainable()
    found["reference weights"] = fingerprint({name: x for name, x in tensors if not x.requires_grad})
    found["trainable parameters"] = fingerprint({name: tuple(p.shape) for name, p in trainable.items()})
    return found | {START: fingerprint({k: p for k, p in trainable.items() if not k.startswith("value_head.")})}


def reward_identity(reward: Callable) -> str:
    """The reward's name and digest. A reward with an attribute `identity`, a text, is identified by that instead."""
    if isinstance(name := getattr(reward, "identity", None), str):
        return name
    return f"{getattr(reward, '__qualname__', type(reward).__qualname__)} {fingerprint(reward)}"


def code_of(*objects: Callable | type) -> str:
    """A digest of their source text alone: unlike a `fingerprint` it does not follow what they call, down to kernels
    that keep a state."""
    return fingerprint([inspect.getsource(x) for x in objects])


def fingerprint(x) -> str:
    """16 hexadecimal digits that depend on the contents of x: data, tensors, modules, functions, nested in any way.

    A function counts by its name, code, constants, defaults, closure and the globals it uses; an object by its class,
    code included, and attributes. What is installed counts by name, what can't be looked into by its class alone.

    >>> fingerprint({"a": [1, 2]}) == fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    True
    """
    digest = hashlib.sha256()
    _feed(digest.update, x, {})
    return digest.hexdigest()[:16]


def _feed(add: Callable, x, seen: dict[int, tuple]) -> None:
    """Pass the contents of x to `add` in an order that never changes; `seen` holds what was passed before, so that
    cycles end. (Tuples, texts and code may be one object or equal ones: that must not count.)"""
    add(f"{type(x).__module__}.{type(x).__qualname__}(".encode())
    if known := seen.get(id(x)):
        add(f"number {known[0]}".encode())
    elif isinstance(x, torch.Tensor):
        add(f"{x.dtype}{tuple(x.shape)}".encode())
        x = x.detach().cpu()
        x = (x if x.layout == torch.strided else x.to_dense()).resolve_conj().resolve_neg()
        add(x.contiguous().reshape(-1).view(torch.uint8).numpy())
    elif (parts := _parts(x)) is None:
        add(repr(x).encode("utf-8", "backslashreplace"))
    else:
        if not isinstance(x, tuple | types.CodeType):
            seen[id(x)] = (len(seen), x)  # x is kept, or another object might get its id
        for part in parts:
            _feed(add, part, seen)
    add(b")")


def _parts(x) -> list | tuple | None:
    """What x consists of, or None where its `repr` says it all."""
    match x:
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType():
            return None
        case list() | tuple():
            return x
        case dict() if type(x) is dict:
            return [part for item in x.items() for part in item]
        case set() | frozenset():  # their order differs from process to process
            return sorted(map(fingerprint, x))
        case types.CodeType():
            return x.co_code, x.co_consts, x.co_names
        case types.FunctionType():
            return _function_parts(x)
        case property():
            return x.fget, x.fset
        case torch.nn.Module():
            own = {k: v for k, v in vars(x).items() if k[0] != "_" and k != "training"}
            return [type(x), own, dict(x._parameters), dict(x._buffers), dict(x.named_children())]
        case PreTrainedTokenizerBase():
            return [sorted(x.get_vocab().items())]
        case type() if not _installed(x):
            kept = {k: v for k, v in vars(x).items() if k[:2] != "__" or isinstance(v, types.FunctionType)}
            return [_name(x), x.__bases__, kept]
        case type() | types.ModuleType() | types.BuiltinFunctionType():
            return [_name(x)]
    return [x.__wrapped__] if hasattr(x, "__wrapped__") else _pickled(x)


def _name(x) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', None) or x.__name__}"


def _installed(x) -> bool:
    """Whether a function or class is Python's or of an installed package: then it counts by name, not by its code."""
    module = x if isinstance(x, types.ModuleType) else sys.modules.get(x.__module__)
    if module is None or module.__name__ == "__main__" or (module is builtins and not hasattr(builtins, x.__name__)):
        return False  # run by path or by exec: nobody else has it
    file = getattr(module, "__file__", None)
    return file is None or file.startswith(LIBRARIES)


def _function_parts(f: types.FunctionType) -> list:
    """Name, code, and all outside it that it uses."""
    names = sorted(_names(f.__code__))
    used = {name: f.__globals__[name] for name in names if name in f.__globals__}
    for name, x in used.items():
        if isinstance(x, types.FunctionType) and (_installed(x) or x.__module__ == __name__):
            used[name] = _name(x)  # this module's own functions know where Python is: that must not count
        elif isinstance(x, types.ModuleType) and not _installed(x):
            used[name] = {n: getattr(x, n) for n in names if hasattr(x, n)}
    cells = [c.cell_contents for c in f.__closure__ or () if c != types.CellType()]  # an empty cell has no contents
    return [f.__qualname__, f.__code__, f.__defaults__, f.__kwdefaults__, vars(f), cells, used]


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function's code uses, that of functions inside it included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _pickled(x) -> list:
    """What pickle would store of an object; nothing of one that can't be stored."""
    try:
        reduced = copyreg.dispatch_table.get(type(x), lambda x: x.__reduce_ex__(4))(x)
    except Exception:
        return []
    return [list(p) if isinstance(p, Iterator) else p for p in (reduced if isinstance(reduced, str) else reduced[1:])]
