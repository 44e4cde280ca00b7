"""The one exception type that users see."""

from __future__ import annotations


class QuotaError(Exception):
    """Bad input, told in one line: what is wrong, where, and the offending value.

    The command line prints it as ``error: <line>`` and exits with status 2; library callers can
    catch it. Anything else that escapes is a defect of this project.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
