"""What the README shows works as it stands, and it names the two commands."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, tiny_lm, tokenizer):
    """Executed word for word, but for the model's name; the prompts' words are unknown to the tiny model, no matter."""
    tiny_lm().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code.replace("path/or/hub-name", str(tmp_path / "model")), scope)
    assert len(scope["rows"]) == 3 and (tmp_path / "runs/mine/model/value_head.safetensors").exists()


def test_the_first_screen_names_both_commands_and_every_link_leads_somewhere():
    assert "make demo" in README[:1200] and "make test" in README[:1200]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
    assert "@" not in README, "a number is still to be filled in"
