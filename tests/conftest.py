"""One thread: these networks are tiny, and threads that wait for one another cost more than they bring.

No deadline for hypothesis: a busy machine is no fault of the code.
"""

from __future__ import annotations

import os

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("fewmask", deadline=None)
settings.load_profile("fewmask")
