"""The one exception for input that its author can mend."""


class Refused(ValueError):
    """A config, data file or checkpoint that cannot be used; the message names file, key, value and remedy.

    Entries print the message without a traceback and exit with code 2.
    """
