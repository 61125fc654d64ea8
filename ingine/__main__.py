"""`ingine`, and `python -m ingine`. Commands are imported late, so that Ctrl-C meanwhile is no traceback."""

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
