"""One module per command. Bodies import what they need when they run, so that `plumbline --help` stays fast."""
