"""Every setting, named once: AlgorithmConfig is what a loss reads, TrainConfig adds what a run of `loop.train` reads.

They are the command line and the documentation; standard library only, so that `klq train --help` is instant.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class AlgorithmConfig:
    """Settings of KLQ, PPO-clip and PPO-penalty, all that `algorithms` reads; values out of range are refused."""

    algorithm: Literal["klq", "ppo_clip", "ppo_penalty"] = "klq"  # What is minimised on each batch of rollouts.
    # KL coefficient τ in units of reward per nat: how much reward one nat away from the reference must earn.
    tau: float = 0.2
    gamma: float = 1.0  # Discount γ.
    lam: float = 0.95  # λ of the λ-return: 0 bootstraps from the next value, 1 uses the whole sampled return.
    alpha: float = 0.2  # Step size α of the regression target; the proximal weight of KLQ and PPO-penalty is τ/α.
    loss: Literal["l2", "huber", "value_clipped", "ratio_clipped", "double_clipped"] = "l2"  # Variant of the KLQ loss.
    # Q may move this far in value_clipped and double_clipped; for PPO, V may (None: no value clipping).
    clip: float | None = None
    log_ratio_clip: float | None = None  # The log-ratio may move this far in ratio_clipped and double_clipped.
    delta: float | None = None  # Threshold of the huber loss.
    ratio_clip: float = 0.2  # PPO-clip's ε.
    vf_coef: float = 1.0  # PPO's value coefficient (KLQ's is 1/τ, fixed by the loss).
    whiten: bool = False  # Whiten the advantages Δ: PPO's habit; for KLQ an ablation that breaks the equivalence.
    # Factor on the value gradient that enters a trunk shared with the policy. None: τ for KLQ, 1 for PPO.
    value_grad_scale: float | None = None
    # Cut the traces of replayed completions by Retrace's c = min(1, π/μ); else they are taken as they are.
    retrace: bool = False

    def __post_init__(self):
        for f in fields(self):
            if get_origin(f.type) is Literal:
                self._require(f"must be one of {get_args(f.type)}", get_args(f.type).__contains__, f.name)
            elif f.type is int:
                self._require("must be an integer", lambda x: _is_number(x) and isinstance(x, int), f.name)
            elif f.type is bool:
                self._require("must be True or False", lambda x: isinstance(x, bool), f.name)
            elif f.type is not str:
                self._require("must be a finite number", lambda x: x is None or _is_number(x), f.name)
        self._require("must be a finite number > 0", lambda x: x > 0, "tau", "ratio_clip")
        self._require("must lie in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "lam")
        self._require("must lie in (0, 1]", lambda x: 0 < x <= 1, "alpha")
        self._require("must be >= 0", lambda x: x >= 0, "vf_coef")
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        """Thresholds are positive, given where the loss needs them, and absent where they would have no effect."""
        if self.algorithm != "klq":
            self._require(f"is a KLQ variant and has no effect on {self.algorithm}", lambda x: x == "l2", "loss")
        needed = [name for name, losses in THRESHOLDS.items() if self.loss in losses]
        allowed = needed if self.algorithm == "klq" else ["clip"]
        idle = [name for name in THRESHOLDS if name not in allowed]
        self._require("must be > 0 or None", lambda x: x is None or x > 0, *THRESHOLDS)
        self._require(f"must be given for loss={self.loss!r}", lambda x: x is not None, *needed)
        self._require(f"has no effect on {self.algorithm} {self.loss}", lambda x: x is None, *idle)

    def _require(self, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            if not holds(value := getattr(self, name)):
                raise ValueError(f"{name} {rule}, got {value!r}")

    @property
    def trunk_scale(self) -> float:
        """The factor on the value gradient into a shared trunk that `value_grad_scale` resolves to."""
        default = self.tau if self.algorithm == "klq" else 1.0
        return default if self.value_grad_scale is None else self.value_grad_scale

    def to_dict(self) -> dict:
        """The settings as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainConfig(AlgorithmConfig):
    """Settings of one training run: an algorithm's, and what the loop around it reads."""

    updates: int = 80  # Batches of rollouts, each followed by `epochs` passes over it.
    batch_size: int = 64  # Completions per batch.
    epochs: int = 4  # Passes over each batch.
    minibatches: int = 1  # Optimiser steps per pass.
    learning_rate: float = 2e-3  # Adam's step size at the start; it decays linearly.
    warmup_updates: int = 0  # Updates over which the learning rate rises: Adam's first steps are its most reckless.
    final_lr_fraction: float = 0.05  # Learning rate at the end as a fraction of that at the start.
    # Cooling: τ falls from here (if that is more) to `tau` over the first half of the run. None: no cooling. Raising
    # `updates` later makes that half longer, so τ may rise once more.
    tau_start: float | None = None
    # Earlier completions added to each batch, with fresh log-probs, values and targets; no reward is asked twice.
    replay: int = 0
    replay_batches: int = 40  # How many batches back replayed completions may come from.
    samples_per_prompt: int = 1  # Completions of each prompt in a batch.
    # What is subtracted from rewards (metrics show them as they are): nothing, the first batch's mean, or each prompt's
    # mean under the reference. At γ = 1 that changes no optimal policy and leaves V less to learn.
    centre: Literal["none", "batch", "prompt"] = "none"
    # Completions per prompt from which the reference's means are estimated at the start, for centre = "prompt".
    centre_samples: int = 8
    # Gradients are clipped to this norm, policy and critic apart (KLQ's value gradient is 1/τ times PPO's).
    max_grad_norm: float = 1.0
    # Value head on the policy's trunk, or a critic network of its own (twice the compute).
    critic: Literal["shared", "separate"] = "shared"
    temperature: float = 1.0  # Divides policy and reference logits alike, in rollouts and in losses.
    max_new_tokens: int = 24  # Length limit of a completion.
    eval_every: int = 5  # Evaluate (where the world can) every so many updates, and after the last.
    checkpoint_every: int = 10  # Save a checkpoint every so many updates; one is saved on Ctrl-C as well.
    seed: int = 0  # Same seed and number of threads, same metrics on a CPU, bit for bit.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    # Precision of forward passes (autocast); parameters, optimiser, statistics and losses are always float32. auto:
    # bfloat16 where the hardware multiplies it fast; a run keeps what it began with.
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        counts = ("updates", "batch_size", "epochs", "minibatches", "max_new_tokens", "eval_every", "checkpoint_every")
        counts += ("replay_batches", "samples_per_prompt", "centre_samples")
        self._require("must be an integer >= 1", lambda x: x >= 1, *counts)
        self._require("must be a finite number > 0", lambda x: x > 0, "learning_rate", "max_grad_norm", "temperature")
        self._require("must lie in [0, 1]", lambda x: 0 <= x <= 1, "final_lr_fraction")
        self._require("must be >= 0", lambda x: x >= 0, "warmup_updates", "seed", "replay")
        self._require("must be None or > 0", lambda x: x is None or x > 0, "tau_start")
        self._require("must not exceed batch_size", lambda x: x <= self.batch_size, "minibatches")
        self._require("has no effect without replay", lambda x: not x or self.replay > 0, "retrace")
        whole = f"must divide batch_size={self.batch_size}"
        self._require(whole, lambda x: self.batch_size % x == 0, "samples_per_prompt")

    def cooled(self, update: int) -> "TrainConfig":
        """The settings in this update of U: τ_u = τ (τ_start/τ)^max(0, 1 − 2u/U).

        >>> [round(TrainConfig(tau=0.1, tau_start=0.4, updates=4).cooled(u).tau, 3) for u in range(4)]
        [0.4, 0.2, 0.1, 0.1]
        """
        ratio = max(1.0, (self.tau_start or self.tau) / self.tau)
        return replace(self, tau=self.tau * ratio ** max(0.0, 1 - 2 * update / self.updates))


THRESHOLDS = {  # and the variants of the KLQ loss that need them
    "clip": ("value_clipped", "double_clipped"),
    "log_ratio_clip": ("ratio_clipped", "double_clipped"),
    "delta": ("huber",),
}


def _is_number(x) -> bool:
    """True for a finite number that is no boolean."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
