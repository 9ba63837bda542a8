"""The trainer: every stage that runs as a Job or as a local process."""
