"""KL-regularised Q-learning for RLHF, from exact theory to real language models. The rooms, from the ground up:

core      the mathematics on token trees that can be enumerated: improvement steps, returns, objectives
machine   the device and threads to compute with, and the facts a measurement comes with
files     files that are complete or not there, and where a measurement comes from
figures   every plot, defined once
rlhf      the same mathematics on language models: policy, rollout, algorithms, loop, runs
worlds    what there is to train on, one file each, listed in `worlds.registry`
bench     the kernels (`klq_kernels`) fused against naive: time, memory, error
course    what the notebooks need: checks, exercises, the builder of their editions
app       the command line `klq` and what only it needs
"""

__version__ = "0.1.0"
