"""The verbs: one file each, the library's API."""
