"""The errors a caller may catch.

    AdalinkError
    |- ConfigError       a wrong argument, key or combination of settings
    |- DataError         a file, column or sample that cannot be read or does not fit
    |  `- BudgetError    more bad samples than the budget allows
    |- AttachError       a port, layer or linear that the frozen model does not have, or a model that cannot be edited
    |- CheckpointError   an adapter file that is damaged, or made for another base
    `- TerminatedError   the process was asked to end (SIGTERM, Ctrl-C), and has saved what it did; the command line exits with 143 or 130

Every message is one sentence that says what is wrong, what was found, what was expected and what to do. The command line prints
it and exits with code 2; nothing else is printed for these.
"""


class AdalinkError(Exception):
    """Anything the caller can mend."""


class ConfigError(AdalinkError):
    """A wrong argument, key or combination of settings."""


class DataError(AdalinkError):
    """A file, column or sample that cannot be read or does not fit."""


class BudgetError(DataError):
    """More bad samples than the budget allows."""


class AttachError(AdalinkError):
    """A port, layer or linear that the frozen model does not have, or a model that cannot be edited."""


class CheckpointError(AdalinkError):
    """An adapter file that is damaged, or made for another base."""


class TerminatedError(AdalinkError):
    """The process was asked to end (SIGTERM, Ctrl-C), and has saved what it did. exit_code: of a command that ends so, 128 and the signal's number."""

    def __init__(self, message: str, exit_code: int = 143) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])
