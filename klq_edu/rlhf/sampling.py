"""Autoregressive sampling: a key-value cache without finished rows, and draws that depend on nothing but the seed."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from klq_edu.rlhf.blocks import watch_block

WORTH_DROPPING = 1 / 8  # of the rows: dropping them copies the cache, about what one step does


class Decoder:
    """Token-by-token policy logits with a key-value cache; keeps the frozen trunk's activations as it goes."""

    def __init__(self, policy):
        self.policy, self.cache, self.trunk, self.rows = policy, None, [], None
        policy.lm.eval()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Feed new tokens [b, n] of the present rows (the mask covers all so far): their next-token logits [b, A]."""
        policy, place = self.policy, positions(attention_mask)[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": place}
        self.rows = torch.arange(len(input_ids), device=input_ids.device) if self.rows is None else self.rows
        watch = watch_block(policy.lm, policy.frozen_blocks, lambda args, _: self.trunk.append((self.rows, args[0])))
        with watch, policy.precision():
            out = policy.lm.base_model(**inputs, past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            return policy.head(out.last_hidden_state[:, -1])

    def read(self, prompt_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prompts' next-token logits [B, A]; a prompt that comes several times is fed once, where the cache of the
        model lets rows be picked."""
        once, place = torch.cat([prompt_ids, attention_mask], dim=1).unique(dim=0, return_inverse=True)
        if len(once) == len(place) or not self.policy.can_drop_rows:
            return self(prompt_ids, attention_mask)
        logits = self(*once.tensor_split(2, dim=1))
        self.cache.batch_select_indices(place)
        self.rows = torch.arange(len(place), device=place.device)
        self.trunk = [(self.rows, x[place]) for _, x in self.trunk]
        return logits[place]

    def keep(self, index: Tensor) -> None:
        """Go on with these of the present rows only."""
        self.cache.batch_select_indices(index)
        self.rows = self.rows[index]

    def activations(self) -> Tensor | None:
        """Trunk activations [B, L, d] of all tokens fed so far, 0 for rows not kept; None without a frozen trunk."""
        if not self.trunk:
            return None
        batch = len(self.trunk[0][0])
        whole = (x.new_zeros((batch, *x.shape[1:])).index_copy_(0, rows, x) for rows, x in self.trunk)
        return torch.cat(list(whole), dim=1)


def sample(
    policy, prompt_ids: Tensor, attention: Tensor, eos: Tensor, constraint, state: Tensor | None, steps: int,
    temperature: float, generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Tokens [B, T], their mask, allowed tokens [B, T, A] or None, trunk activations [B, L, d] or None.

    Row b's token at step t is decided by one uniform number, drawn for every row and step in advance: when other rows
    end changes nothing. Finished rows go on, masked; once left out of the forward passes they repeat their last token.
    """
    decode, ids, last = Decoder(policy), None, prompt_ids[:, -1]
    place = "cpu" if last.device.type == "mps" else last.device  # MPS has no float64
    uniform = torch.rand((steps, len(last)), generator=generator, dtype=torch.float64).to(place)
    alive = torch.ones(len(last), dtype=torch.bool, device=last.device)
    tokens, mask, allowed = [], [], []
    with packed_linears(policy):
        for u in uniform.unbind():
            logits = decode.read(prompt_ids, attention) if ids is None else decode(ids, attention)
            logits = logits.float() / temperature
            rows = decode.rows
            if constraint is not None:
                allowed.append(constraint.allowed(state).to(logits.device))
                logits = logits.masked_fill(~allowed[-1][rows], -torch.inf)
            probs = logits.softmax(-1)
            chosen = draw(probs.to(place), u[rows.to(place)]).to(last.device)
            last = last.index_copy(0, rows, policy.token_ids(chosen))
            tokens.append(last)
            mask.append(alive)
            alive = alive & ~torch.isin(last, eos)
            broken = probs[:, 0].isnan() & mask[-1][rows]
            left, any_broken = torch.stack([alive.sum(), broken.any()]).tolist()  # the one time the host waits
            if any_broken:
                raise FloatingPointError("probabilities are not finite: training diverged; lower learning_rate")
            if not left:
                break
            if constraint is not None:
                state = constraint.advance(state, last.to(state.device))
            if policy.can_drop_rows and len(rows) - left >= WORTH_DROPPING * len(rows):
                index = alive[rows].nonzero().squeeze(1)
                decode.keep(index)
                attention = attention[index]
            ids = last[decode.rows].unsqueeze(1)
            attention = torch.cat([attention, torch.ones_like(ids)], dim=1)
    return *(torch.stack(x, 1) if x else None for x in (tokens, mask, allowed)), decode.activations()


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Indices [n] drawn from probabilities [n, V] by inverting their cumulative distribution at u [n] in [0, 1).

    The first index whose cumulative probability (a float64 sum) exceeds u times the total: never one with p = 0.

    >>> draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 3), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    tensor([1, 3, 3])
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    if probs.device.type != "cpu":  # a sum in parallel may waver in its last bits, and so rise where p = 0
        cumulative = cumulative.where(probs > 0, 0.0).cummax(-1).values
    total = cumulative[:, -1:]
    bound = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, bound, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)


@contextmanager
def packed_linears(policy):
    """Within this context linear layers on a CPU multiply by weights that oneDNN has repacked, in the policy's dtype.

    Decoding is a few rows times a large matrix: packing that anew for every token takes longer than multiplying.
    """
    here = policy.device.type == "cpu" and torch.backends.mkldnn.is_available()
    here = here and (policy.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    modules = policy.lm.base_model.modules() if here else ()
    linears = [m for m in modules if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    try:
        for module in linears:
            weight, bias = (None if p is None else p.detach().to(policy.dtype) for p in (module.weight, module.bias))
            module.forward = partial(_linear, torch.ops.mkldnn._reorder_linear_weight(weight), bias)
        yield
    finally:
        for module in linears:
            vars(module).pop("forward", None)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, bias, "none", [], "")


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids of left-padded sequences: 0 at the first real token (and before it), then 1, 2 …"""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
