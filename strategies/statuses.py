"""The statuses that a process of a run ends with, beside 0 for a run that is done and 1 for an exception of its own."""

INTERRUPTED = 130  # by Ctrl-C, SIGINT: the run was saved
PREEMPTED = 143  # by SIGTERM, or a signal that preemption_signals names: the run was saved
ANOTHER_FAILED = 70  # another rank failed first; what it failed with is on the screen
HUNG = 75  # no rank went on for hang_timeout seconds; what each waited for is on the screen
ENDED_BY_SIGNAL = (INTERRUPTED, PREEMPTED)  # such a run isn't started again by the launcher that was told to end
