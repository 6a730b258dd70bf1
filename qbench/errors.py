"""The two ways in which something goes wrong on purpose."""


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, why, and what to do. The command line exits with 2."""


class Unsupported(Exception):  # noqa: N818  the word that plugin authors read: raise Unsupported("why")
    """A plugin cannot handle this model, task or machine: a status of the run, not a crash."""
