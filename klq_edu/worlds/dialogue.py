"""SmolLM2-135M learns to answer everyday requests: single-turn dialogue, one of the two tasks of KLQ's paper.

610 requests with reference answers were written for this project (worlds/data/README.md). The model is fine-tuned on
354 of them; pairs of its own answers are labelled by a gold that knows the reference, with noise; a reward model learns
from the pairs, and RL maximises what it says.
"""

from klq_edu.worlds.text import text_task

SYSTEM = "Answer in one to three sentences."


def chat(tokenizer, request: str) -> str:
    """The request as the model's chat template puts it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


TASK = text_task("dialogue", __doc__, ("prompt", "answer"), chat, lead="", words=40)
