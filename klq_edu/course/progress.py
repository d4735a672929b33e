"""Which exercises passed, kept in one small file on this machine: $KLQ_PROGRESS, else in the user's state folder."""

import os
from datetime import datetime
from pathlib import Path

from klq_edu.files import read_json, write_json


class Progress:
    """Exercise numbers -> when they first passed. A file that cannot be written costs the memory, never the check."""

    def __init__(self, path: Path | None = None):
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        self.path = path or Path(os.environ.get("KLQ_PROGRESS") or state / "klq-edu" / "progress.json")

    def read(self) -> dict[str, str]:
        """All that passed; nothing where the file is missing or broken."""
        try:
            return read_json(self.path)
        except (OSError, ValueError):
            return {}

    def record(self, number: str) -> None:
        """Remember that it passed now."""
        done = self.read()
        if number in done:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, done | {number: datetime.now().isoformat(timespec="minutes")})
        except OSError as error:
            print(f"(not remembered: {self.path} cannot be written, {error})")
