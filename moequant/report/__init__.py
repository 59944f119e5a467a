"""Results of commands as text, pages and pictures."""
