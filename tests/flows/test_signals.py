"""A run that is being closed is not cut off by the signal that a worker sends meanwhile."""

import os
import signal

from flows.runner import undisturbed


def test_signals_do_nothing_while_a_run_is_closed() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
