"""The one exception a user of the toolkit meets; it imports nothing, so every module may raise it."""


class FourierBiasError(ValueError):
    """Bad input, in one line that names the thing and the mend.

    The command line prints it as ``Error: …`` and exits with status 2.
    """
