"""The way into `klq`: expected errors and signals end it with one clear line, during imports too."""

import os
import signal
import sys
from contextlib import suppress

from klq_edu.rlhf.signals import StopSignals

ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError)  # those that a message explains
RESUMED = {"demo", "train", "hub", "sweep", "compare"}  # commands that take up what an interrupt left
KEPT = "; what is done is kept. The same command continues with what is missing"


def main() -> None:
    """Entry point: run the command (see `commands`); KLQ_DEBUG=1 shows where an error was raised."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that can't show τ must not end a run
    with StopSignals() as stop:
        try:
            from klq_edu.app.commands import run

            run()
        except BaseException as error:  # where a signal came it may be any (an import then reports ImportError)
            signum = signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
            signum = getattr(error, "signum", stop.signum or signum)
            if not signum and (os.environ.get("KLQ_DEBUG") or not isinstance(error, ERRORS)):
                raise
            text = f"klq: {error}\n(KLQ_DEBUG=1 shows where this was raised)"
            if signum:
                text = f"\nInterrupted{KEPT if RESUMED.intersection(sys.argv[1:2]) else ''}."
            with suppress(OSError):  # the terminal may be gone
                print(text, file=sys.stderr)
            sys.exit(128 + signum if signum else 1)


if __name__ == "__main__":
    main()
