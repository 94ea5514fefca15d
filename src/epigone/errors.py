"""The two ways in which a command ends badly; the command line prints either as one line."""


class UserError(Exception):
    """What the user gave cannot be used: what, which value, what to do. Exit code 2."""


class Busy(UserError):
    """Another process is at the same work."""


class Fault(Exception):
    """The run could not go on: a full disk, a damaged file, a loss that is not a number. Exit code 1."""


class Stopped(BaseException):
    """The run was asked to stop and saved what it had; the same command goes on. Exit code 143.

    Like KeyboardInterrupt it is no Exception: what catches those to tell of a failure must let it pass.
    """
