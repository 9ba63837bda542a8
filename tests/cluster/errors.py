"""The two ways in which the test cluster can disappoint its caller."""


class ClusterUnavailableError(Exception):
    """This machine cannot run the wanted part; the message names what is missing and what would make it run.

    Tests turn it into a skip, the command line into exit code 3.
    """

    def __init__(self, missing: str, remedy: str) -> None:
        super().__init__(f"{missing}. To make it run: {remedy}")
        self.missing = missing
        self.remedy = remedy


class ClusterFailedError(Exception):
    """Everything needed is there, yet a part did not come up; the message quotes the end of that part's log."""
