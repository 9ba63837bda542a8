"""Fixtures and rules for every test; see support/cluster_fixtures.py and support/skips.py."""

pytest_plugins = [
    "pytester",
    "support.cluster_fixtures",
    "support.release",
    "support.tenant",
    "support.reference",
    "support.skips",
]
