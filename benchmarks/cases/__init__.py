"""The cases, a file for each or for a few that belong together; importing one registers it."""
