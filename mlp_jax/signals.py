"""Signals that ask a training to stop, heard while compiled code runs."""

import os
import signal
import socket
import sys
import threading
from typing import NoReturn


class StopSignals:
    """Within the block, the first SIGINT or SIGTERM is a request, the second ends the process.

    `requested` is the signal's number, or 0. Python runs its handlers between two bytecodes of the
    main thread, which may wait for minutes inside a compiled program; the wakeup socket is written
    at once, and a thread of its own listens. To be used in the main thread.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.requested = 0
        self._listener, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Python's own handlers would raise KeyboardInterrupt, or end the process; what the parent
        # lets its children ignore, as nohup does, stays ignored
        numbers = [n for n in self.NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while heard := self._listener.recv(1):
            if heard[0] not in self.NUMBERS:
                continue
            if self.requested:
                os._exit(128 + heard[0])
            self.requested = heard[0]
            name = signal.Signals(self.requested).name
            print(f"\n{name}: stopping after this epoch; repeat it to exit now", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._listener.close()

    def exit(self, line: str) -> NoReturn:
        """End the process with the status of the requested signal, after one more line."""
        print(f"{signal.Signals(self.requested).name}: {line}", file=sys.stderr)
        sys.exit(128 + self.requested)
