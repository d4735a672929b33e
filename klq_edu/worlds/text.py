"""Tasks with references: data of our own, a gold that knows the reference, judges that compare with it."""

import json
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from klq_edu.rlhf.reading import Reader
from klq_edu.rlhf.rewards import Reward
from klq_edu.worlds.gold import Gold, hacks
from klq_edu.worlds.judges import EmbeddingJudge, ReferenceJudge
from klq_edu.worlds.road import Task
from klq_edu.worlds.weights import minilm_folder

DATA = Path(__file__).parent / "data"
FREQUENT_TOKENS = 32_000


def text_task(
    name: str, description: str, columns: tuple[str, str], prompt: Callable[..., str], lead: str, words: int
) -> Task:  # fmt: skip
    """A task on data/<name>_train.jsonl and data/<name>_test.jsonl, whose `columns` are source and reference;
    `prompt(tokenizer, source)` makes a prompt, completions begin with `lead` and have at most so many words."""

    def data(tokenizer) -> dict[str, Dataset]:
        return {part: read_part(DATA / f"{name}_{part}.jsonl", tokenizer) for part in ("train", "test")}

    def read_part(path: Path, tokenizer) -> Dataset:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        source, reference = ([row[column] for row in rows] for column in columns)
        said = {"prompt": [prompt(tokenizer, s) for s in source], "completion": [lead + r for r in reference]}
        return Dataset.from_dict(said | {"source": source, "reference": reference})

    def tried(rows: Dataset) -> dict[str, list[str]]:
        return hacks(rows["source"][:], rows["reference"][:], lead)

    return Task(name, description, data, lambda reader: Gold(reader, words), judges, FREQUENT_TOKENS, tried)


def judges(reader: Reader) -> dict[str, Reward]:
    """The sentence embeddings' judge where its weights are installed, and the frozen model's."""
    folder = minilm_folder()
    independent = {"MiniLM": EmbeddingJudge(folder)} if folder else {}
    return independent | {"SmolLM2": ReferenceJudge(reader)}
