"""Which exercises passed, kept in one small file on this machine: $KLQ_PROGRESS, else in the user's state folder."""

import json
import os
from datetime import datetime
from pathlib import Path


class Progress:
    """Exercise numbers -> when they first passed. A file that cannot be written costs the memory, never the check."""

    def __init__(self, path: Path | None = None):
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        self.path = path or Path(os.environ.get("KLQ_PROGRESS") or state / "klq-edu" / "progress.json")

    def read(self) -> dict[str, str]:
        """All that passed; nothing where the file is missing or broken."""
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def passed(self, number: str) -> bool:
        """Whether this exercise has passed before."""
        return number in self.read()

    def record(self, number: str) -> None:
        """Remember that it passed now."""
        done = self.read()
        if number in done:
            return
        done[number] = datetime.now().isoformat(timespec="minutes")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(done, indent=1), encoding="utf-8")
        except OSError as error:
            print(f"(not remembered: {self.path} cannot be written, {error})")
