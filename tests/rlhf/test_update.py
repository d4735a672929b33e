"""What `train` logs and does to every weight is what the theory says, recomputed here in float64, one row at a time.

`oracle` is an independent re-implementation of the loop. It takes only the sampled texts from the run: plain forward
passes, explicit sums over time, every loss and Adam by hand. Each field of TrainConfig is changed once, for each
algorithm it concerns: the run must follow the oracle, and must differ from the run before the change.
"""

import copy
import functools
import itertools
import math
import shutil
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from klq_edu.rlhf.algorithms import ALGORITHMS
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.loop import train
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.runs import Run

PROMPTS = Dataset.from_dict({"prompt": ["w5", "w6 w7 w8", "w9 w10", "w11 w12 w13 w14"], "worth": [1.0, -0.5, 2.0, 1.5]})
BASE = {
    "updates": 2, "batch_size": 4, "epochs": 2, "learning_rate": 3e-3, "final_lr_fraction": 0.5, "max_grad_norm": 1.5,
    "tau": 0.3, "gamma": 0.9, "lam": 0.8, "alpha": 0.6, "temperature": 0.7, "vf_coef": 0.7, "max_new_tokens": 5,
    "device": "cpu",
}  # fmt: skip
TOLERANCE = 2e-3  # relative: of each metric, and of the change of all weights of policy and critic
LINEAR = {"max_grad_norm": 1e-7}  # far below Adam's ε: steps are proportional to the clipped gradients
KLQ, CLIP, PENALTY = "klq", "ppo_clip", "ppo_penalty"
FOR_ALL = LINEAR | {
    "updates": 3, "batch_size": 2, "epochs": 3, "learning_rate": 1e-3, "warmup_updates": 1, "final_lr_fraction": 0.1,
    "tau": 0.1, "gamma": 0.5, "lam": 0.3, "value_grad_scale": 0.1, "temperature": 1.5,
    "max_new_tokens": 3, "seed": 1, "tau_start": 0.9, "replay": 8, "centre": "batch",
}  # fmt: skip
CASES = [(field, value, ALGORITHMS, {}) for field, value in FOR_ALL.items()] + [
    # field, its new value, the algorithms it concerns, what else is set before and after the change
    ("whiten", True, ALGORITHMS, LINEAR),  # whitened gains have no mean, so the gradient of V's bias has no sign
    ("critic", "separate", ALGORITHMS, LINEAR),  # weights that hardly reach V have gradients without a sign
    ("centre", "prompt", [KLQ], {"value_is_set": False}),
    ("centre", "batch", [KLQ], {"value_is_set": False}),
    ("centre_samples", 3, [KLQ], {"centre": "prompt"}),
    ("replay", 99, [KLQ], {"centre": "prompt", "updates": 3}),  # what is replayed was centred, and once
    ("replay_batches", 1, [CLIP], {"replay": 99, "updates": 4}),
    ("retrace", True, [KLQ, PENALTY], {"replay": 99, "updates": 3, "learning_rate": 6e-3}),
    ("alpha", 0.3, [KLQ, PENALTY], {}),
    ("vf_coef", 2.0, [CLIP, PENALTY], {}),
    ("clip", 0.05, [CLIP, PENALTY], {}),
    ("ratio_clip", 0.03, [CLIP], {}),
    ("loss", "huber", [KLQ], {"delta": 0.4}),
    ("loss", "value_clipped", [KLQ], {"clip": 0.1}),
    ("loss", "ratio_clipped", [KLQ], {"log_ratio_clip": 0.1}),
    ("loss", "double_clipped", [KLQ], {"clip": 0.03, "log_ratio_clip": 0.2}),
    ("delta", 0.8, [KLQ], {"loss": "huber", "delta": 0.4}),
    ("clip", 0.02, [KLQ], {"loss": "value_clipped", "clip": 0.1}),
    ("log_ratio_clip", 0.02, [KLQ], {"loss": "ratio_clipped", "log_ratio_clip": 0.1}),
]


def score(prompts, completions, worth):
    """The reward: any function of the texts and of the dataset's further columns."""
    words = [[int(w[1:]) if w[1:].isdigit() else 0 for w in c.split()] for c in completions]
    return [k * sum(n % 3 for n in ns) / 4 + len(p) / 8 for p, ns, k in zip(prompts, words, worth, strict=True)]


def models(tiny_lm, critic="shared", blocks=None):
    """A policy away from its reference (else every log-ratio is 0 and hides faults), and that reference's model."""
    lm = tiny_lm()
    lm.lm_head.weight.data[1] *= 4  # EOS often ends a completion early
    reference, policy = copy.deepcopy(lm).double(), ActorCritic(lm, critic=critic, trainable_blocks=blocks)
    for name, p in policy.trainable().items():
        p.data += (0.1 if of_critic(name) else 0.02) * torch.randn(p.shape)
    return policy, reference


class Everything:
    """The constraint that allows all tokens."""

    def start(self, prompts):
        return torch.zeros(len(prompts))

    def allowed(self, state):
        return torch.ones(len(state), 61, dtype=torch.bool)

    def advance(self, state, tokens):
        return state


def trained(tiny_lm, tokenizer, folder, changes, blocks=None, value_is_set=True, constraint=None, prompts=PROMPTS):
    """Train; returns (rows, how far the weights moved), and what the oracle needs to predict both."""
    config, batches = TrainConfig(**(BASE | changes)), []

    def reward(prompts, completions, worth):
        batches.append((prompts, completions))
        return score(prompts, completions, worth)

    policy, reference = models(tiny_lm, config.critic, blocks)
    policy.value_is_set = value_is_set
    start, run = copy.deepcopy(policy).double(), Run(folder, config.to_dict())
    rows = train(policy, tokenizer, prompts, reward, config, run=run, constraint=constraint)
    given = SimpleNamespace(policy=start, reference=reference, batches=batches, config=config, tokenizer=tokenizer)
    return outcome(rows, start.trainable(), policy.trainable()), given


def of_critic(name):
    return name.startswith(("value_head", "critic_body"))


def outcome(rows, before, after):
    moves = {name: (after[name].detach().cpu().double() - p.detach()).flatten() for name, p in before.items()}
    groups = {part: [m for name, m in moves.items() if of_critic(name) == part] for part in (False, True)}
    return rows, {("policy", "critic")[part]: torch.cat(group) for part, group in groups.items()}


def differences(got, expected):
    """Relative difference of each logged metric, and of how the weights of policy and critic moved."""
    (rows, moves), (rows2, moves2) = got, expected
    if len(rows) != len(rows2) or any(moves[k].shape != moves2[k].shape for k in moves):
        return {"shape": float("inf")}
    out = {k: ((moves[k] - moves2[k]).norm() / moves2[k].norm()).item() for k in moves}
    for row, row2 in zip(rows, rows2, strict=True):
        out |= {f"{k} {row['update']}": abs(row[k] - x) / (abs(x) + 0.01) for k, x in row2.items() if k != "seconds"}
    return out


def agree(got, expected, tolerance=TOLERANCE):
    """True if all differences are small; otherwise the assertion shows those that are not."""
    wrong = {k: d for k, d in differences(got, expected).items() if not d < tolerance}
    assert not wrong, wrong
    return True


def differ(got, expected):
    return max(differences(got, expected).values()) > 5 * TOLERANCE


def oracle(given, orders=None):
    """Every update from the texts sampled in it; `orders` [update][step] are the rows of each optimiser step."""
    c, policy, moments, rows = given.config, copy.deepcopy(given.policy), {}, []
    params = policy.trainable()
    batches, means, before = centred(given)
    remembered = []  # (token ids, reward less its prompt's mean, log-probs when sampled) of each completion, by batch
    for u, (prompts, completions) in enumerate(batches):
        final = given.config.tau
        tau = final * (max(c.tau_start or 0, final) / final) ** max(0, 1 - 2 * u / c.updates)
        c = SimpleNamespace(**vars(given.config) | {"tau": tau})
        pairs = [read(given.tokenizer, *texts, c.max_new_tokens) for texts in zip(prompts, completions, strict=True)]
        scores = scores_of(prompts, completions)
        rewards = scores - torch.tensor([means[p] for p in prompts], dtype=torch.float64)
        if u == 0 and not given.policy.value_is_set:
            policy.value_head.weight.data.zero_()
            policy.value_head.bias.data.fill_(rewards.mean())
        with torch.no_grad():
            sampled = [look(policy, given.reference, pair, c).logp for pair in pairs]
            new = list(zip(pairs, rewards, sampled, strict=True))
            older = list(itertools.chain(*remembered[-c.replay_batches :]))
            assert not c.replay or c.replay >= len(older)  # else which ones are drawn is left to chance
            used = new + older if c.replay else new
            remembered.append(new)
            pairs = [pair for pair, _, _ in used]
            old = [look(policy, given.reference, pair, c) for pair in pairs]
            fixed = targets(old, [r for _, r, _ in used], c, [mu for _, _, mu in used])
        lr = c.learning_rate * min(1, (u + 1) / (c.warmup_updates + 1))
        lr *= 1 + (c.final_lr_fraction - 1) * u / max(c.updates - 1, 1)
        steps = []
        for index in orders[u] if orders else [range(len(pairs))] * c.epochs:
            new = [look(policy, given.reference, pairs[i], c) for i in index]
            mean = torch.cat(
                [loss(n, old[i], fixed[i], c) for n, i in zip(new, index, strict=True)]
            ).mean()  # of tokens
            norm = step(params, torch.autograd.grad(mean, list(params.values())), moments, lr, c.max_grad_norm)
            fresh = [n.logp.detach() - old[i].logp for n, i in zip(new, index, strict=True) if i < len(scores)]
            ratio = torch.cat(fresh)  # log π/π_old of what π_old sampled
            steps.append((mean.item(), norm, (ratio.exp() - 1 - ratio).mean().item()))
        count = sum(row["row_steps"] for row in rows[-1:]) + (
            sum(map(len, orders[u])) if orders else len(used) * c.epochs
        )
        now = len(scores)
        row = metrics(u, old[:now], fixed[:now], scores, steps, given.config) | {"learning_rate": lr, "tau": tau}
        rows.append(row | {"rollouts": before + row["rollouts"], "row_steps": count})
    return outcome(rows, given.policy.trainable(), params)


def scores_of(prompts, completions):
    worth = dict(zip(PROMPTS["prompt"], PROMPTS["worth"], strict=True))
    return torch.tensor(score(prompts, completions, [worth[p] for p in prompts]), dtype=torch.float64)


def centred(given):
    """The batches of the updates, what is subtracted from each prompt's rewards, and how many completions that cost."""
    c, batches = given.config, list(given.batches)
    if c.centre == "none":
        return batches, dict.fromkeys(PROMPTS["prompt"], 0.0), 0
    if c.centre == "batch":
        return batches, dict.fromkeys(PROMPTS["prompt"], scores_of(*batches[0]).mean()), 0
    extra = batches[1 : 1 + -(-len(PROMPTS) * c.centre_samples // c.batch_size)]
    prompts, completions = (list(itertools.chain(*column)) for column in zip(*extra, strict=True))
    scores, found = scores_of(prompts, completions), {p: [] for p in PROMPTS["prompt"]}
    for p, s in zip(prompts, scores, strict=True):
        found[p].append(s)
    assert {len(f) for f in found.values()} == {c.centre_samples}
    return [batches[0], *batches[1 + len(extra) :]], {p: sum(f) / len(f) for p, f in found.items()}, len(prompts)


def read(tokenizer, prompt, completion, limit):
    """Token ids of prompt and completion; a completion shorter than the limit was ended by EOS."""
    prompt, completion = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    return prompt, completion + [1] * (len(completion) < limit)


def look(policy, reference, pair, c):
    """log π, log π_b, V, H(π), D(π‖π_b), each [T], of one completion: plain forward passes, no padding, no cache."""
    prompt, completion = pair
    ids, here = torch.tensor([prompt + completion[:-1]]), slice(len(prompt) - 1, None)
    hidden = policy.lm.base_model(ids).last_hidden_state[0, here]
    logp = (policy.lm.lm_head(hidden) / c.temperature).log_softmax(-1)
    logq = (reference(ids).logits[0, here].detach() / c.temperature).log_softmax(-1)
    if c.critic == "separate":
        seen = policy.critic_body(ids).last_hidden_state[0, here]
    else:
        default = c.tau if c.algorithm == KLQ else 1
        scale = default if c.value_grad_scale is None else c.value_grad_scale  # τ is this update's
        seen = scale * hidden + (1 - scale) * hidden.detach()
    taken = range(len(completion)), completion
    return SimpleNamespace(
        logp=logp[taken], logq=logq[taken], v=policy.value_head(seen)[:, 0],
        entropy=-(logp.exp() * logp).sum(-1), kl=(logp.exp() * (logp - logq)).sum(-1),
    )  # fmt: skip


def targets(old, scores, c, sampled):
    """Per row: Q_old, Δ; Ĝ for Q, Â for the policy gradient, V_old + Δ for V. `sampled` are log μ of the tokens."""
    rows = []
    for o, final, mu in zip(old, scores, sampled, strict=True):
        q, T = c.tau * (o.logp - o.logq) + o.v, len(o.v)
        td = [(c.gamma * o.v[t + 1] if t + 1 < T else final) - q[t] for t in range(T)]
        cut = (o.logp - mu).exp().clamp(max=1) if c.retrace else torch.ones(T)
        trace = [[math.prod(cut[t + 1 : k + 1].tolist()) for k in range(T)] for t in range(T)]
        delta = [sum((c.gamma * c.lam) ** (k - t) * trace[t][k] * td[k] for k in range(t, T)) for t in range(T)]
        delta = torch.stack(delta)
        rows.append(SimpleNamespace(q=q, delta=delta, gain=delta, v=o.v + delta))
    every = torch.cat([row.delta for row in rows])
    for row in rows:
        if c.whiten:
            row.gain = (row.delta - every.mean()) / every.std(correction=0)
        row.g = row.q + c.alpha * row.gain
    return rows


def loss(new, old, fixed, c):
    """The loss of each token, on the scale on which −Â∇log π is the first gradient."""
    if c.algorithm == KLQ:
        q = c.tau * (new.logp - new.logq) + new.v
        e, squares = q - fixed.g, [(q - fixed.g) ** 2]
        if c.loss in ("value_clipped", "double_clipped"):
            squares += [(fixed.q + (q - fixed.q).clamp(-c.clip, c.clip) - fixed.g) ** 2]
        if c.loss in ("ratio_clipped", "double_clipped"):
            near = old.logp + (new.logp - old.logp).clamp(-c.log_ratio_clip, c.log_ratio_clip)
            squares += [(c.tau * (near - new.logq) + new.v - fixed.g) ** 2]
        out = torch.stack(squares).amax(0) / 2
        if c.loss == "huber":
            out = torch.where(e.abs() <= c.delta, e**2 / 2, c.delta * (e.abs() - c.delta / 2))
        return out / (c.alpha * c.tau)
    ratio = (new.logp - old.logp).exp()
    if c.algorithm == CLIP:
        out = -torch.minimum(ratio * fixed.gain, ratio.clamp(1 - c.ratio_clip, 1 + c.ratio_clip) * fixed.gain)
    else:
        out = -ratio * fixed.gain + c.tau / c.alpha * (ratio * ratio.log() - ratio + 1)
    squares = (new.v - fixed.v) ** 2
    if c.clip is not None:
        near = old.v + (new.v - old.v).clamp(-c.clip, c.clip)
        squares = torch.maximum(squares, (near - fixed.v) ** 2)
    return out + c.vf_coef * squares / 2


@torch.no_grad()
def step(params, grads, moments, lr, limit):
    """Clip policy and critic apart, then Adam; returns the policy's gradient norm before clipping."""
    grads, norms = dict(zip(params, grads, strict=True)), {}
    for part in (False, True):
        norms[part] = sum((g**2).sum().item() for name, g in grads.items() if of_critic(name) == part) ** 0.5
    for name, p in params.items():
        g = grads[name] * min(1.0, limit / (norms[of_critic(name)] + 1e-6))
        m, s, t = moments.get(name, (0, 0, 0))
        m, s, t = moments[name] = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2, t + 1
        p -= lr * m / (1 - 0.9**t) / ((s / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return norms[False]


def metrics(u, old, fixed, scores, steps, c):
    """What loop.METRICS promises; `steps` holds loss, gradient norm and KL(π_old‖π) of each optimiser step."""
    entropy, v = (torch.cat([vars(o)[k] for o in old]) for k in ("entropy", "v"))
    kl, reward = sum(o.kl.sum().item() for o in old) / len(old), scores.mean().item()
    return {
        "update": u, "rollouts": (u + 1) * c.batch_size, "length": len(v) / len(old), "value": v.mean().item(),
        "reward": reward, "reward_std": scores.std(correction=0).item(), "kl": kl, "objective": reward - c.tau * kl,
        "entropy": entropy.mean().item(), "kl_old": steps[-1][2],
        "loss": sum(s[0] for s in steps) / len(steps), "grad_norm": sum(s[1] for s in steps) / len(steps),
        "advantage_rms": torch.cat([f.delta for f in fixed]).square().mean().sqrt().item(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_lm, tokenizer, tmp_path_factory):
    """A function: changes to BASE, options -> what `trained` returns; the same run is trained once."""

    @functools.cache
    def once(changes, options):
        return trained(tiny_lm, tokenizer, tmp_path_factory.mktemp("run"), dict(changes), **dict(options))

    return lambda changes, **options: once(tuple(changes.items()), tuple(options.items()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithm_follows_its_formulas_and_no_other(run, algorithm):
    got, given = run({"algorithm": algorithm})
    assert len({len(text.split()) for _, texts in given.batches for text in texts}) > 1  # lengths differ
    assert agree(got, oracle(given))
    assert all(differ(got, run({"algorithm": other})[0]) for other in ALGORITHMS if other != algorithm)


@pytest.mark.parametrize(
    "field, value, algorithm, rest",
    [pytest.param(f, v, a, rest, id=f"{f}={v}-{a}") for f, v, algorithms, rest in CASES for a in algorithms],
)
def test_each_field_does_what_the_formulas_say(run, field, value, algorithm, rest):
    options = {k: rest[k] for k in rest.keys() & {"value_is_set"}}
    rest = {k: v for k, v in rest.items() if k not in options}
    got, given = run({"algorithm": algorithm, **rest, field: value}, **options)
    assert agree(got, oracle(given))
    before = {} if field == "loss" else rest  # a threshold without its loss is refused
    assert differ(got, run({"algorithm": algorithm} | before, **options)[0])


def test_every_field_has_a_case_or_a_test_of_its_own():
    for name in {f.name for f in fields(TrainConfig)} - {case[0] for case in CASES}:
        assert any(test.startswith(f"test_{name}_") for test in globals()), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_blocks_and_a_fresh_value_head_follow_the_formulas(run, algorithm):
    """A fresh V starts at the first batch's mean reward; frozen blocks are replayed, not run again."""
    got, given = run({"algorithm": algorithm}, blocks=2, value_is_set=False)
    assert agree(got, oracle(given))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_minibatches_part_the_batch_in_each_epoch(run, algorithm):
    """Which rows meet is left to chance: exactly one of the ways to part three rows, twice, explains the run."""
    got, given = run({"algorithm": algorithm, "minibatches": 2, "batch_size": 3, "updates": 1})
    parts = [[[1, 2], [0]], [[0, 2], [1]], [[0, 1], [2]]]
    guesses = [oracle(given, [first + second]) for first, second in itertools.product(parts, repeat=2)]
    assert sum(max(differences(got, guess).values()) < TOLERANCE for guess in guesses) == 1


def test_each_epoch_is_shuffled_anew(run, monkeypatch):
    parts, real = [], ALGORITHMS[KLQ]
    monkeypatch.setitem(
        ALGORITHMS, KLQ, lambda policy, old, *rest: parts.append(old.prompts) or real(policy, old, *rest)
    )
    run({"minibatches": 2, "epochs": 6, "updates": 1})
    epochs = [tuple(first + second) for first, second in zip(parts[::2], parts[1::2], strict=True)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(PROMPTS["prompt"]))} and len(set(epochs)) > 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dtype_bfloat16_rounds_but_keeps_the_formulas(run, algorithm):
    got, given = run({"algorithm": algorithm, "dtype": "bfloat16", "updates": 1, "epochs": 1} | LINEAR)
    assert agree(got, oracle(given), 0.2) and differ(got, oracle(given))


VARIANTS = [{"algorithm": a} for a in ALGORITHMS] + [{f: v} | rest for f, v, _, rest in CASES if f == "loss"]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: c.get("loss", c.get("algorithm")))
def test_a_constraint_that_allows_everything_changes_nothing(run, changes):
    """The fused path (no logits) and the constrained path (masked logits) are the same mathematics."""
    fused, sampled = run(changes)
    constrained, again = run(changes, constraint=Everything())
    assert sampled.batches == again.batches and agree(fused, constrained)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_samples_per_prompt_come_from_the_same_prompt(run, samples):
    """Four completions per batch, twice: each prompt is used equally often in the end, and sampled afresh each time."""
    _, given = run({"samples_per_prompt": samples, "updates": 4, "learning_rate": 1e-12})
    for prompts, completions in given.batches:
        assert prompts == [p for p in prompts[::samples] for _ in range(samples)]
        assert len(set(prompts)) == 4 // samples and (samples == 1 or len(set(completions)) > 1)
    assert {sum(p == q for ps, _ in given.batches for q in ps) for p in PROMPTS["prompt"]} == {4}


def test_each_update_and_each_seed_samples_afresh(run):
    """Four completions of one prompt by an unchanging policy, twice and from another seed: no two batches alike."""
    still, one = {"learning_rate": 1e-12}, PROMPTS.select([0])
    batches = run(still, prompts=one)[1].batches + run(still | {"seed": 1}, prompts=one)[1].batches
    assert len({tuple(texts) for _, texts in batches}) == 4


@pytest.mark.parametrize("every, evaluated", [(2, [1, 3, 4]), (9, [4])])
def test_eval_every_and_after_the_last_update(tmp_path, tiny_lm, tokenizer, every, evaluated):
    config, policy = TrainConfig(**(BASE | {"updates": 5, "eval_every": every, "epochs": 1})), models(tiny_lm)[0]
    run = Run(tmp_path, config.to_dict())
    rows = train(policy, tokenizer, PROMPTS, score, config, run=run, evaluate=lambda policy: {"quality": 1.0})
    assert [row["update"] for row in rows if "quality" in row] == evaluated


@pytest.mark.parametrize("every, kept", [(1, 3), (2, 2), (9, 0)])
def test_checkpoint_every_so_many_updates(tmp_path, tiny_lm, tokenizer, every, kept):
    """A killed process goes on from its last checkpoint: here from a copy of the folder before the fourth is saved."""
    config, done = TrainConfig(**(BASE | {"updates": 4, "checkpoint_every": every, "epochs": 1})), []

    def go(name, on_update):
        run = Run(tmp_path / name, config.to_dict())
        train(models(tiny_lm)[0], tokenizer, PROMPTS, score, config, run=run, on_update=on_update)

    go("whole", lambda row: row["update"] == 3 and shutil.copytree(tmp_path / "whole", tmp_path / "killed"))
    go("killed", done.append)
    assert [row["update"] for row in done] == list(range(kept, 4))


def test_device_auto_trains_where_it_says(run):
    got, given = run({"device": "auto"})
    assert agree(got, oracle(given))
