"""Other people's runtimes, called from here."""
