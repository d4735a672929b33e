"""Ctrl-C, SIGTERM and SIGHUP while training: stop at a point from which the run can continue, and save."""

import signal
import sys
import threading
from contextlib import suppress

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signum)  # what pickle makes it from again, in the parent of a sweep's workers
        self.signum = signum


class StopSignals:
    """Within this context a first signal raises Interrupted: at once, or where `busy`, in `done`; a second one at once.

    Signals that are ignored (by nohup, say) stay so. Only the main thread gets signals; elsewhere this does nothing.
    """

    def __init__(self):
        self.signum, self.again, self.busy, self._before = None, False, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for s in SIGNALS:
                if signal.getsignal(s) not in (signal.SIG_IGN, None):
                    self._before[s] = signal.signal(s, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def start(self) -> None:
        """From here to `done` a first signal waits. One that has come, swallowed by somebody's code, is raised now."""
        if self.signum is not None and not self.busy:
            raise Interrupted(self.signum)
        self.busy = True

    def done(self) -> None:
        """What had to be finished is finished: raise Interrupted if a signal has come."""
        self.busy = False
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _receive(self, signum: int, _frame) -> None:
        self.again, self.signum = self.signum is not None, signum
        if self.again or not self.busy:
            raise Interrupted(signum)
        with suppress(OSError, ValueError, RuntimeError):  # no terminal any more, or it is being written to
            print("\nstopping when this update is finished; once more to stop at once", file=sys.stderr)
