"""`python -m moequant`, and the command `moequant`."""

import os
import sys


def main() -> None:
    """Run the command line."""
    import signal  # after what stands at the end of this file

    # Nothing has begun while modules are loaded, nor goes on when the command has ended: a signal then ends
    # the process as any other, without Python's traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from moequant.cli import app

    app()


if __name__ == "__main__":
    # Python puts the current folder in front of all others, where a stranger's json.py would be imported. It
    # has no business there, unless moequant itself lies in it. Modules imported before this line are beyond
    # our reach: the command `moequant`, or `python -P -m moequant`, never looks there.
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # noqa: PTH120, PTH100  pathlib would come from that folder
        del sys.path[0]
    main()
