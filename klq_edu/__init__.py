"""KL-regularised Q-learning for RLHF: exact theory (`core`), language models (`rlhf`) and worlds to train in."""

__version__ = "0.1.0"
