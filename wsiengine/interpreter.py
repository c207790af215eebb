"""Another interpreter like this one, for processes of our own."""

import os
import sys


def same_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that run a module from where this process imports it.

    ``-P``: never from the working directory, unless we do: a user's ``queue.py`` there would be taken for Python's.
    """
    paths = [path or os.curdir for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return [sys.executable, "-P", "-m", module, *arguments], environment
