"""Objects, manifests and checkpoints in object storage."""
