"""The one error type for mistakes a user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was given, the rule it breaks, the remedy. The command line
    prints it without a traceback and exits with code 2.
    """
