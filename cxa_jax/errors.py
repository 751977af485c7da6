"""The error a user can mend."""


class UserError(ValueError):
    """Bad input, file, field or flag: the message names it and the cure; launch.py prints it without a traceback."""
