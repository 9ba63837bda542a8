"""Fixtures and rules for every test; see support/cluster_fixtures.py and support/skips.py."""

from hypothesis import settings

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
