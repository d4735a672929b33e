"""The way into `klq`: expected errors and signals end it with one clear line, during imports too."""

import os
import signal
import sys
from contextlib import suppress

from klq_edu.rlhf.signals import StopSignals

ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError)  # those that a message explains


def main() -> None:
    """Entry point: run the command (see `commands`); KLQ_DEBUG=1 shows where an error was raised."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that can't show τ must not end a run
    with StopSignals() as stop:
        try:
            from klq_edu.app.commands import run

            run()
        except BaseException as error:
            sys.exit(_ended(error, stop.signum))


def _ended(error: BaseException, signum: int | None) -> int | str | None:
    """Exit status after an exception; where a signal came it may be any (an import then reports ImportError)."""
    signum = getattr(error, "signum", signum or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None))
    if signum:
        _say("\nInterrupted; what is done is kept. The same command continues with what is missing.")
        return 128 + signum
    if isinstance(error, SystemExit):
        return error.code
    if os.environ.get("KLQ_DEBUG") or not isinstance(error, ERRORS):
        raise error
    _say(f"klq: {error}\n(KLQ_DEBUG=1 shows where this was raised)")
    return 1


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
