"""Output: claimed before any work is done, and never half-written under its own name.

`claim` checks and locks every target of a run. `atomic` and `atomic_folder` give a temporary name
beside the target to write to, and put the result in its place when it is complete. A run that dies
leaves at most temporaries and a lock file, which the next run to the same target removes.
"""

from moequant.files.folder import RECORD, check_kept
from moequant.files.large import room
from moequant.files.parts import part_names
from moequant.files.scratch import is_scratch, scratch, sweep_scratch
from moequant.files.signals import Interrupted, interruptible
from moequant.files.targets import check_space, reason, unwritable
from moequant.files.temporary import JOURNAL, discard, sync
from moequant.files.write import atomic, atomic_folder, atomic_parts, check_output, claim

__all__ = [
    "JOURNAL",
    "RECORD",
    "Interrupted",
    "atomic",
    "atomic_folder",
    "atomic_parts",
    "check_kept",
    "check_output",
    "check_space",
    "claim",
    "discard",
    "interruptible",
    "is_scratch",
    "part_names",
    "reason",
    "room",
    "scratch",
    "sweep_scratch",
    "sync",
    "unwritable",
]
