"""KLQ on language models: policy, rollout, rewards, loop."""
