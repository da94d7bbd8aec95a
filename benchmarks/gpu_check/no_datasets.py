"""In place of `datasets`, on a machine that lacks it: with what it needs it would fill a bundle.

SpecForge imports it for annotations. What would use it says that it is not there.
"""


class Dataset:
    """The name of a type."""

    def __init__(self, *_: object, **__: object) -> None:
        raise ImportError("datasets is not in the bundle: pip install datasets")


def load_dataset(*_: object, **__: object) -> None:
    """Raise ImportError: there is no such package here."""
    Dataset()
