"""`python -m moequant`."""

import os
import sys

# Python puts the current folder in front of all others, where a stranger's json.py would be imported. It has
# no business there, unless moequant itself lies in it. Modules imported before this line are beyond our
# reach: the command `moequant`, or `python -P -m moequant`, never looks there.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # noqa: PTH120, PTH100  pathlib would come from that folder
    del sys.path[0]

from moequant.cli import app

app()
