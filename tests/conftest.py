"""Fixtures and rules for every test; see support/cluster_fixtures.py and support/skips.py."""

import os

from hypothesis import settings

# What tests compute is small, and other tests want the other cores: a second thread would mostly wait. It is said here,
# before anything loads torch, and reaches the processes that tests start; support/threads.py is for tests of more threads.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = [
    "pytester",
    "support.cluster_fixtures",
    "support.release",
    "support.tenant",
    "support.reference",
    "support.skips",
]

# How long an example takes says something about the machine and nothing about the code.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")
