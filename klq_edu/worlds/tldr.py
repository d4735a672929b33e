"""SmolLM2-135M learns to sum up everyday posts in a sentence: summarisation, one of the two tasks of KLQ's paper.

728 posts with summaries were written for this project (worlds/data/README.md). The model is fine-tuned on 472 of them;
pairs of its own summaries are labelled by a gold that knows the reference, with noise; a reward model learns from the
pairs, and RL maximises what it says.
"""

from klq_edu.worlds.text import text_task

TASK = text_task("tldr", __doc__, ("text", "summary"), lambda _, text: f"TEXT: {text}\n\nTL;DR:", lead=" ", words=14)
