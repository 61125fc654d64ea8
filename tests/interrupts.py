"""Ctrl-C in programs that tests start."""

import signal


def heed_interrupts() -> None:
    """Undo that SIGINT is ignored, as it is in what a script starts in the background.

    Programs that are started here would ignore it too.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
