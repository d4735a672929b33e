"""What a run was trained on, in digests: the same folder must not answer for another model, prompts or reward."""

import hashlib
import itertools
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.runs import START

DEEPEST = 100


def fingerprint(x) -> str:
    """16 hexadecimal digits that depend on the contents of x: data, tensors, modules, functions, nested in any way.

    A function counts by its name, code, constants, defaults, closure and the globals it uses; an object by its class
    and attributes. What Python can't see into (a connection, say) counts by its class alone.

    >>> fingerprint({"a": [1, 2]}) == fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    True
    """
    digest = hashlib.sha256()
    _feed(digest.update, x, (), {})
    return digest.hexdigest()[:16]


def identity(prompts: Dataset, reward: Callable, policy: ActorCritic | None = None) -> dict[str, str]:
    """Digests of the prompts (all columns and rows, whatever format they come in), the reward and the policy."""
    rows = list(prompts.with_format(None).iter(1000))
    digests = {"prompts": fingerprint([sorted(prompts.column_names), rows]), "reward": reward_identity(reward)}
    return digests if policy is None else digests | policy_identity(policy)


def reward_identity(reward: Callable) -> str:
    """The reward's name and digest. A reward with an attribute `identity`, a text, is identified by that instead."""
    if isinstance(name := getattr(reward, "identity", None), str):
        return name
    return f"{getattr(reward, '__qualname__', type(reward).__qualname__)} {fingerprint(reward)}"


def policy_identity(policy: ActorCritic) -> dict[str, str]:
    """Digests of the frozen reference, of the trainable parameters' names and shapes, and of their present values.

    The value head's are left out: a run sets it to the mean reward in its first update.
    """
    tensors = itertools.chain(policy.named_parameters(), policy.named_buffers())
    frozen = {name: x for name, x in tensors if not x.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in policy.trainable().items()}
    start = {name: p for name, p in policy.trainable().items() if not name.startswith("value_head.")}
    return {
        "reference weights": fingerprint(frozen),
        "trainable parameters": fingerprint(shapes),
        START: fingerprint(start),
    }


def _feed(add: Callable[[bytes], None], x, path: tuple[int, ...], seen: dict) -> None:
    """Pass the contents of x to `add` in an order that never changes. `path` holds what x lies in; `seen` what has a
    name or a state of its own and was passed before."""
    add(f"{type(x).__module__}.{type(x).__qualname__}(".encode())
    parts, known = _parts(x), seen.get(id(x))
    if known or id(x) in path or len(path) > DEEPEST:
        add(f"again {known and known[0]}".encode())
    elif isinstance(x, torch.Tensor | np.ndarray):
        _feed_array(add, x)
    elif parts is None:
        add(repr(x).encode("utf-8", "backslashreplace"))
    else:
        if not isinstance(x, list | tuple | dict | types.CodeType):
            seen[id(x)] = (len(seen), x)
        for part in parts:
            _feed(add, part, (*path, id(x)), seen)
    add(b")")


def _feed_array(add: Callable[[bytes], None], x: torch.Tensor | np.ndarray) -> None:
    add(f"{x.dtype}{tuple(x.shape)}".encode())
    if isinstance(x, np.ndarray):
        add(repr(x.tolist()).encode() if x.dtype.hasobject else np.ascontiguousarray(x).tobytes())
    else:
        add(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _parts(x) -> list | tuple | None:
    """What x consists of, or None where its `repr` says it all."""
    match x:
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType():
            return None
        case torch.Tensor() | np.ndarray() | list() | tuple():
            return x
        case dict():
            return [part for item in x.items() for part in item]
        case set() | frozenset():  # their order differs from process to process
            return sorted(map(fingerprint, x))
        case types.CodeType():
            return x.co_code, x.co_consts, x.co_names
        case types.FunctionType():
            return _function_parts(x)
        case types.MethodType():
            return x.__func__, x.__self__
        case torch.nn.Module():
            return [x.state_dict()]
        case PreTrainedTokenizerBase():
            return [sorted(x.get_vocab().items())]
        case type() | types.ModuleType() | types.BuiltinFunctionType():
            return [f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', None) or x.__name__}"]
    return [x.__wrapped__] if hasattr(x, "__wrapped__") else _pickled(x)


def _function_parts(f: types.FunctionType) -> list:
    """Name, code, and all outside it that it uses; functions of other modules by name only."""
    used = {name: f.__globals__[name] for name in sorted(_names(f.__code__)) if name in f.__globals__}
    for name, x in used.items():
        if isinstance(x, types.FunctionType) and x.__module__ != f.__module__:
            used[name] = f"{x.__module__}.{x.__qualname__}"
    return [f.__qualname__, f.__code__, f.__defaults__, f.__kwdefaults__, [*map(_content, f.__closure__ or ())], used]


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function's code uses, that of functions inside it included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _content(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None


def _pickled(x) -> list:
    """Class arguments and attributes as pickle would store them; nothing for what can't be stored."""
    try:
        reduced = x.__reduce_ex__(4)
    except Exception:
        return []
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
