"""One thread: these networks are tiny, and threads that wait for one another cost more than they bring.

No deadline for hypothesis: a busy machine is no fault of the code. Its examples are the same at each run, so that a
change is what makes a test fail; `pytest --hypothesis-profile explore` tries others, and more of them.
"""

from __future__ import annotations

import os

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("fewmask", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fewmask")


def pytest_runtest_setup() -> None:
    """Forget the precision of an earlier test's training, which Accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
