"""Runs the command line: `ingine`, or `python -m ingine`.

Commands are imported inside `main`, so that Ctrl-C during their import prints no traceback.
"""

import sys

INTERRUPTED = 130


def main() -> None:
    try:
        from ingine.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
