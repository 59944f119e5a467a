"""`python -m moequant`."""

from moequant.cli import app

app()
