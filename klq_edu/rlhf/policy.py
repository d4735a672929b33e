"""ActorCritic: a causal language model plus a value head, which together are an action-value function.

Any Hugging Face causal LM can be trained whole, or with only its top k blocks trainable. In the second case the frozen
trunk below them is run once per rollout: its activations feed the policy, the critic and the reference alike, and the
reference keeps a copy of the top blocks only.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from klq_edu.rlhf.blocks import TopBlocks, blocks_of, record_call
from klq_edu.rlhf.sampling import Decoder, positions

VALUE_FILE = "value_head.safetensors"


class ActorCritic(nn.Module):
    """Policy π_θ, value V_θ and frozen reference π_b around one causal language model.

    Args:
        lm: a Hugging Face causal LM; its weights become the policy's (trained in place) and, copied, the reference's.
        trainable_blocks: train only this many top blocks (and the final norm); None trains everything.
        critic: "shared" puts the value head on the policy's last hidden state; "separate" gives the critic its own
            copy of the trained part, which is best where it is affordable.
        value_grad_scale: factor on the value gradient that enters a shared trunk, which `train` sets. KLQ's loss weighs
            V against log π by 1/τ (claim 2 of the equivalence); the factor τ keeps that from drowning the policy's.
        vocab: token ids the policy may use, [A]; None allows all. Policy and reference are restricted alike: their
            frozen head (give `trainable_blocks`) computes A logits per token instead of V. What is saved has all V.

    Raises ValueError for a model whose logits are not a linear head(hidden), decoded from left-padded prompts with a
    cache as well, for an impossible `trainable_blocks`, or for ids outside the vocabulary.
    """

    def __init__(
        self, lm: PreTrainedModel, *, trainable_blocks: int | None = None, critic: str = "shared",
        value_grad_scale: float = 1.0, vocab: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        _check_head(lm)
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be 'shared' or 'separate', got {critic!r}")
        self.lm, self.value_grad_scale, self.dtype = lm, value_grad_scale, torch.float32
        self.body, self.frozen_blocks = lm.base_model, None
        if trainable_blocks is not None:
            self.body = TopBlocks(lm.requires_grad_(False), trainable_blocks).requires_grad_(True)
            self.frozen_blocks = len(blocks_of(lm)) - trainable_blocks
        self.head, vocab = _restricted(lm.get_output_embeddings(), vocab, trainable_blocks)
        self.register_buffer("vocab", vocab, persistent=False)
        self.ref_body = copy.deepcopy(self.body).requires_grad_(False)
        self.ref_head = copy.deepcopy(self.head).requires_grad_(False) if trainable_blocks is None else self.head
        self.critic_body = copy.deepcopy(self.body) if critic == "separate" else None
        self.value_head = nn.Linear(self.head.in_features, 1, device=lm.device)
        self.start_value(0.0)
        self.value_is_set = False
        self.to(lm.device)
        self.can_drop_rows = _check_forward(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, **kwargs) -> "ActorCritic":
        """Load what `save_pretrained` wrote, or any causal LM by path or hub name (then with a fresh value head).

        Pass the same `critic` and `trainable_blocks` as at saving. The *loaded* policy becomes the new reference.
        """
        policy = cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), **kwargs)
        if (saved := Path(folder) / VALUE_FILE).exists():
            try:
                policy.critic_modules().load_state_dict(load_file(saved))
            except RuntimeError as error:
                fit = "does not fit this critic (same critic and trainable_blocks as saved?)"
                raise ValueError(f"{saved} {fit}: {error}") from error
            policy.value_is_set = True
        return policy

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that loads as a plain causal LM with the full vocabulary, and the critic beside it."""
        self.lm.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in self.critic_modules().state_dict().items()}
        save_file(state, Path(folder) / VALUE_FILE)

    def critic_modules(self) -> nn.ModuleDict:
        """What only V uses: the value head, and the separate critic's network if there is one."""
        modules = {"value_head": self.value_head, "critic_body": self.critic_body}
        return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.value_head.weight.device

    def start_value(self, mean_reward: float) -> None:
        """Set V to this constant everywhere. At π = π_b, Q = V, so the right one is the reference's mean reward.

        A wrong offset is KLQ's worst failure: until V has learnt it, only the policy's log-ratios can express it.
        """
        nn.init.zeros_(self.value_head.weight)
        nn.init.constant_(self.value_head.bias, mean_reward)
        self.value_is_set = True

    def precision(self) -> torch.autocast:
        """Context in which forward passes run in `self.dtype`; parameters stay as they are."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything the optimiser may change (nothing else needs checkpointing)."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode(self, input_ids: Tensor, attention_mask: Tensor, trunk: Tensor | None = None) -> dict:
        """What `body` is called with for these sequences [B, L]: the ids for a whole model, else (for top blocks) the
        frozen trunk's activations [B, L, d], which are computed here unless sampling has: then give them as `trunk`.
        """
        place = positions(attention_mask)
        whole = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": place, "use_cache": False}
        if self.frozen_blocks is None:
            return whole
        with torch.no_grad(), self.precision():
            call = record_call(self.lm.eval(), block=self.frozen_blocks if trunk is None else 0, inputs=whole)
        return call if trunk is None else call | {"hidden": trunk}

    def features(self, inputs: dict, keep: slice) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, d], of which `head` makes logits, and values V(s_t) [B, T] at the positions `keep`."""
        hidden = self._hidden(self.body, inputs)[:, keep]
        if self.critic_body is not None:
            seen = self._hidden(self.critic_body, inputs)[:, keep]
        else:  # the hidden states themselves, and their gradient scaled
            seen = hidden.detach().lerp(hidden, self.value_grad_scale)
        return self.cast(hidden), self.value_head(seen.to(self.value_head.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def reference_features(self, inputs: dict, keep: slice) -> Tensor:
        """The frozen reference's hidden states [B, T, d], of which `ref_head` makes logits; no gradient."""
        return self.cast(self._hidden(self.ref_body, inputs)[:, keep])

    def _hidden(self, body: nn.Module, inputs: dict) -> Tensor:
        with self.precision():
            out = body.eval()(**inputs)  # no dropout: log-probs under another draw of it are another policy's
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def cast(self, x: Tensor | None) -> Tensor | None:
        """x in the dtype of forward passes, where that is not the parameters' own."""
        return x if x is None or self.dtype == torch.float32 else x.to(self.dtype)

    def forward(self, inputs: dict, keep: slice) -> tuple[Tensor, Tensor]:
        """Policy logits [B, T, A] and values V(s_t) [B, T] at the positions `keep` of what `encode` prepared."""
        hidden, values = self.features(inputs, keep)
        with self.precision():
            return self.head(hidden), values

    def action_ids(self, tokens: Tensor) -> Tensor:
        """Vocabulary ids -> indices into the allowed vocabulary; −1, which no mask should let through, if not there."""
        if self.vocab is None:
            return tokens
        places = torch.searchsorted(self.vocab, tokens).clamp(max=len(self.vocab) - 1)
        return torch.where(self.vocab[places] == tokens, places, -1)

    def token_ids(self, actions: Tensor) -> Tensor:
        """Indices into the allowed vocabulary -> vocabulary ids."""
        return actions if self.vocab is None else self.vocab[actions]


def context(lm: PreTrainedModel) -> float:
    """The most tokens that the model takes, by its configuration; infinity where that names no limit."""
    config = lm.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit and limit > 0), torch.inf)


def _check_head(lm: PreTrainedModel) -> None:
    """Refuse a model without a linear head, or one that caps its logits: a probe sees that only if they are large."""
    name = type(lm).__name__
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        found = "none" if head is None else type(head).__name__
        raise ValueError(f"lm must have a linear language-model head, {name} has {found}: use AutoModelForCausalLM")
    if getattr(lm.config.get_text_config(), "final_logit_softcapping", None):
        raise ValueError(f"lm: the logits of {name} are capped, not head(hidden), which is assumed here")


def _check_forward(policy: ActorCritic) -> bool:
    """Refuse a model whose logits, decoded and replayed as here, are not those of its own plain forward pass.

    Returns whether its cache can drop finished rows; a model whose cache can't just decodes them to the end.
    """
    name = type(policy.lm).__name__
    try:
        errors = _forward_errors(policy)
    except Exception as error:
        needed = "decode left-padded prompts token by token with a key-value cache, which is needed here"
        raise ValueError(f"lm: {name} can't {needed} ({type(error).__name__}: {error})") from error
    bound = 0.05 if policy.lm.dtype.itemsize < 4 else 5e-3  # bfloat16 rounds, and so may a GPU's float32 products
    for way in ("with a cache", "in one pass"):
        if not (error := errors[way]) < bound:
            reason = "they are not head(hidden), or left padding or cache go wrong"
            raise ValueError(f"lm: the logits of {name} {way} differ by {error:.1%} from its own forward's: {reason}")
    return errors["after dropping a row"] < bound


@torch.no_grad()
def _forward_errors(policy: ActorCritic) -> dict[str, float]:
    """Relative error of a few tokens' logits, by each way used here, from the model's own forward, rows unpadded."""
    lm, end = policy.lm.eval(), min(14, context(policy.lm))
    pads, cuts = (0, (end - 2) // 2), ((0, end - 3), (end - 3, end - 2), (end - 2, end - 1))
    ids = (torch.arange(2 * end, device=lm.device).view(2, end) + 3) % lm.get_output_embeddings().out_features
    mask = torch.stack([torch.arange(end, device=lm.device) >= n for n in pads]).long()
    plain = [lm(input_ids=row[None, n:], attention_mask=mask[:1, n:]).logits[0, -4:] for row, n in zip(ids, pads)]
    expected = torch.stack(plain) if policy.vocab is None else torch.stack(plain)[..., policy.vocab]
    decode = Decoder(policy)
    steps = [decode(ids[:, a:b], mask[:, :b]) for a, b in cuts]
    replayed, _ = policy(policy.encode(ids[:, :-1], mask[:, :-1], decode.activations()), slice(-3, None))
    try:
        decode.keep(torch.tensor([1], device=ids.device))
        dropped = decode(ids[1:, -1:], mask[1:])
    except Exception:  # each kind of cache fails in its own way
        dropped = torch.full_like(steps[0][1:], torch.nan)
    pairs = (torch.stack(steps, 1), expected[:, :3]), (replayed, expected[:, :3]), (dropped, expected[1:, 3])
    scale = torch.stack(plain).float().std().clamp(min=1e-6)
    errors = (((x.float() - y).square().mean().sqrt() / scale).item() for x, y in pairs)
    return dict(zip(("with a cache", "in one pass", "after dropping a row"), errors))


def _restricted(head: nn.Linear, vocab: Tensor | None, trainable_blocks: int | None) -> tuple[nn.Linear, Tensor | None]:
    """A frozen copy of the head with the rows of these tokens only, and their ids in order; all as it is for None."""
    if vocab is None:
        return head, None
    if trainable_blocks is None:
        raise ValueError("vocab needs a frozen head: give trainable_blocks as well, got None")
    vocab = torch.unique(vocab)
    if not len(vocab) or vocab[0] < 0 or vocab[-1] >= head.out_features:
        ends = f"{vocab[0].item()}…{vocab[-1].item()}" if len(vocab) else "none"
        raise ValueError(f"vocab must hold at least one id, all in [0, {head.out_features}), got {ends}")
    small = nn.Linear(head.in_features, len(vocab), bias=head.bias is not None, dtype=head.weight.dtype)
    small.load_state_dict({name: x[vocab.to(x.device)] for name, x in head.state_dict().items()})
    return small.requires_grad_(False), vocab
