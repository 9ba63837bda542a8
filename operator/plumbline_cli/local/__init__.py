"""The local runner: the same planner as on a cluster, with processes as jobs and a folder as storage."""
