"""Hostile inputs: whatever a model folder, a file or an option holds, one clear line comes out, or a result.

Every kind is a seeded generator of attempts; `judge` runs them and says what broke. `python -m tests.hostile
--inputs 2000` is the long mode, `test_hostile.py` the fast one.
"""
