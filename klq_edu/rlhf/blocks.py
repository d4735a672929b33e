"""Running part of a transformer: record how the model calls one of its blocks, replay the blocks above it.

Works for any Hugging Face causal LM whose blocks are one list of one kind, because it copies the model's own call
(masks, position embeddings, caches) instead of rebuilding it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from transformers import PreTrainedModel


class TopBlocks(nn.Module):
    """The k uppermost blocks and the final norm of a language model, called with recorded block inputs."""

    def __init__(self, lm: PreTrainedModel, count: int):
        super().__init__()
        blocks = blocks_of(lm)
        if count not in range(1, len(blocks) + 1):
            raise ValueError(f"trainable_blocks must lie in [1, {len(blocks)}], the model's blocks, got {count}")
        kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["same"])
        if len(kinds) > 1:
            raise ValueError(f"trainable_blocks needs blocks of one kind, {type(lm).__name__} mixes {sorted(kinds)}")
        parent = next(m for m in lm.base_model.modules() if any(child is blocks for child in m.children()))
        norms = [m for m in parent.children() if "norm" in type(m).__name__.lower()]
        if len(norms) != 1:  # the final one is the blocks' sibling whose class name says so
            found = f"{len(norms)} norms beside its blocks, expected 1"
            raise ValueError(f"{type(lm).__name__} has {found}: train it whole")
        self.blocks, self.norm = nn.ModuleList(blocks[-count:]), norms[0]

    def forward(self, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Replay: the recorded arguments of one block serve them all."""
        for block in self.blocks:
            out = block(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden)


def blocks_of(lm: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks: the one ModuleList as long as the model is deep."""
    depth = lm.config.get_text_config().num_hidden_layers
    found = [m for m in lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ValueError(f"{type(lm).__name__} has no list of {depth} blocks: train it whole (trainable_blocks=None)")
    return found[0]


def watch_block(lm: PreTrainedModel, block: int | None, see: Callable[[tuple, dict], None]) -> AbstractContextManager:
    """Until this context ends `see(args, kwargs)` is called before block number `block` runs (None: never)."""
    if block is None:
        return nullcontext()
    return blocks_of(lm)[block].register_forward_pre_hook(lambda _, *call: see(*call), with_kwargs=True)


class _Reached(Exception):
    """Stops a forward pass at the block whose inputs were wanted, and brings them."""


def record_call(lm: PreTrainedModel, block: int, inputs: dict) -> dict:
    """How the model calls its block number `block`: hidden states, other arguments and keywords. Runs only up to it."""

    def stop(args, kwargs):
        raise _Reached({"hidden": args[0], "args": args[1:], "kwargs": kwargs})

    try:
        with watch_block(lm, block, stop):
            lm.base_model(**inputs)
    except _Reached as reached:
        return reached.args[0]
    raise RuntimeError(f"{type(lm).__name__} never called its block {block}")  # pragma: no cover
