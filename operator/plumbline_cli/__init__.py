"""The `plumbline` command and the local runner."""
