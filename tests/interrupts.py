"""Ctrl-C in programs that tests start."""

import signal


def heed_interrupts() -> None:
    """Stop ignoring SIGINT, which programs do that a script starts in the background.

    Otherwise programs that tests start would ignore it too.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
