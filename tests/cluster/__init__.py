"""A real Kubernetes for tests: control plane, node, S3 server and images, built from source and run as plain processes.

`python -m cluster up` (with `PYTHONPATH=tests`) starts it, `python -m cluster down` removes every trace of it.
"""
