"""A language model behind an OpenAI-compatible endpoint as a judge."""

import json
import re
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from klq_edu.rlhf.judge import Judge

RUBRIC = """You compare two answers to the same request. The better one does what is asked, is right, complete and to \
the point, and finishes. Length alone is no merit, nor is the order in which they stand here.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with JSON only: {{"better": "A"}}, {{"better": "B"}} or {{"better": "tie"}}."""


def endpoint_judge(
    url: str, model: str, *, key: str = "", rubric: str = RUBRIC, timeout: float = 60, jobs: int = 8,
    progress: Callable[[Iterable[float]], Iterable[float]] = iter,
) -> Judge:  # fmt: skip
    """A judge behind an OpenAI-compatible endpoint: POST {url}/chat/completions with a rubric, answered by JSON.

    `rubric` is formatted with prompt, first and second; `progress` passes on the answers as they come. Raises
    RuntimeError that quotes an answer it can't read, and OSError where nobody answers.
    """

    def ask(prompt: str, first: str, second: str) -> float:
        """1 for A, 0 for B, ½ for a tie."""
        content = rubric.format(prompt=prompt, first=first, second=second)
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return _verdict(answer.read().decode())

    def judge(prompts, first, second):
        """What the model behind the endpoint prefers."""
        with ThreadPoolExecutor(jobs) as pool:
            return list(progress(pool.map(ask, prompts, first, second)))

    return judge


def _verdict(answer: str) -> float:
    """The preference in a chat completion; models put words or a code fence around the JSON they were asked for."""
    try:
        said = json.loads(answer)["choices"][0]["message"]["content"]
        better = json.loads(re.search(r"\{[^{}]*\}", said)[0])["better"]
        return {"A": 1.0, "B": 0.0, "tie": 0.5}[better]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        way = 'expected {"better": "A"}, "B" or "tie" in choices[0].message.content'
        raise RuntimeError(f"the judge's answer can't be read ({way}): {answer:.300}") from error
