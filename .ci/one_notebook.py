"""One notebook in a process that has run others before: torch is imported once for many of them.

A module of its own, since IPython puts itself in the place of `__main__`, where a worker would look for this function.
"""
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900   # seconds


def out_of_time(*_): raise TimeoutError(f"this notebook ran for more than {LIMIT} s")


def test_notebook(path):
    "(whether it passed, seconds); what went wrong is printed by nbdev."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(LIMIT)
    try: return test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    finally: signal.alarm(0)
