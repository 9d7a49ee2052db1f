"""What a front is told by who started it: signals that it blocks and asks for, so none is early."""

from __future__ import annotations

import signal

OPEN = signal.SIGUSR2  # listen at the deployment's address
READ_PLAN = signal.SIGUSR1  # go on by the plan as it is now
GIVE_WAY = signal.SIGHUP  # another front listens there: finish what has come here, and end
ORDERS = (OPEN, READ_PLAN, GIVE_WAY)
PATIENCE = "patience"  # file beside the plan: the seconds that running requests have to end
