"""Signals that ask a training to save: SIGTERM and SIGINT to stop after it, SIGUSR1 to go on.

A signal only leaves a note; the loop reads it where it is safe to save.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 3.0
"""One Ctrl-C or `kill` often comes twice, from the terminal and from a launcher that passes it
on. Only a signal this long after the first is a second one."""


class Signals:
    """Inside `with Signals() as asked`, `asked.stop` and `asked.save` say what has come.

    A second SIGTERM or SIGINT ends a script at once. In a kernel (`exit_at_once=False`) it is a
    KeyboardInterrupt. Outside, and off the main thread, signals do what they did before.
    """

    def __init__(self, *, exit_at_once: bool = True, quiet: bool = False):
        self.exit_at_once = exit_at_once
        self.quiet = quiet
        self.stop: signal.Signals | None = None
        self.save = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.stop, self.save = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP, signal.SIGUSR1):
                # A job in the background is started with SIGINT ignored: leave it so.
                if number is signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if name is signal.SIGUSR1:
            self.save = True
        elif self.stop is None:
            self.stop, self._since = name, time.monotonic()
            self._say(f"\n{name.name}: saving at the next step; a second one ends it at once\n")
        elif time.monotonic() - self._since > SAME_SECONDS:
            self.__exit__()
            if not self.exit_at_once:
                raise KeyboardInterrupt
            self._say(f"\n{name.name} again: ended at once\n")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say(self, text: str) -> None:
        if not self.quiet:
            os.write(2, text.encode())  # print may be what was interrupted
