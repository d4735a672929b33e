"""Every setting out of range is refused with its name, its value and the rule."""

import pytest

from klq_edu.rlhf.config import TrainConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tau": 0.0}, "tau must be a finite number > 0, got 0.0"),
        ({"tau": float("nan")}, "tau must be a finite number, got nan"),
        ({"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, r"alpha must lie in \(0, 1\], got 1.5"),
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"gamma": 1.01}, r"gamma must lie in \[0, 1\], got 1.01"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number > 0"),
        ({"updates": 0}, "updates must be an integer >= 1, got 0"),
        ({"batch_size": 2, "minibatches": 3}, "minibatches must not exceed batch_size, got 3"),
        ({"loss": "value_clipped", "clip": -1.0}, "clip must be > 0 or None"),
        ({"clip": 0.2}, "clip has no effect on klq l2, got 0.2"),
        (
            {"algorithm": "ppo_clip", "loss": "huber", "delta": 1.0},
            "loss is a KLQ variant and has no effect on ppo_clip",
        ),
        ({"updates": 1.5}, "updates must be an integer, got 1.5"),
        ({"tau": "0.1"}, "tau must be a finite number, got '0.1'"),
        ({"value_grad_scale": float("nan")}, "value_grad_scale must be a finite number, got nan"),
        ({"algorithm": "dqn"}, "algorithm must be one of .*'klq'.*, got 'dqn'"),
        ({"loss": "l1"}, "loss must be one of .*'l2'.*, got 'l1'"),
        ({"loss": "huber"}, "delta must be given for loss='huber', got None"),
        ({"loss": "value_clipped"}, "clip must be given for loss='value_clipped', got None"),
        ({"loss": "double_clipped", "clip": 1.0}, "log_ratio_clip must be given for loss='double_clipped', got None"),
        ({"critic": "twin"}, "critic must be one of .*, got 'twin'"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_the_trunk_scale_is_tau_for_klq_and_one_for_ppo():
    """Claim 2: KLQ's loss weighs V by 1/τ, and the factor τ on a shared trunk undoes that."""
    assert TrainConfig(tau=0.3).trunk_scale == 0.3
    assert TrainConfig(tau=0.3, algorithm="ppo_clip").trunk_scale == 1
    assert TrainConfig(tau=0.3, value_grad_scale=0.0).trunk_scale == 0
