"""The report of a run: what was trained from what, whether it worked, what it cost. Nothing here imports torch."""
