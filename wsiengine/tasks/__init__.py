"""What a model does with a slide: the tasks, by the name that a card gives. Their contract is in :mod:`.base`."""

from functools import cache

from wsiengine.tasks.base import Task


@cache
def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: There is none (cards are checked for it when they are read).
    """
    if name == "classify":
        from wsiengine.tasks.classification import Classification

        return Classification()
    raise ValueError(f"no task is called {name!r}")
