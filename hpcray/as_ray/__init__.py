"""`import ray` gives hpcray: for programs that say `import ray`, and for Ray's own libraries.

    hpcray run --as-ray script.py     or, as a script's first line:  import hpcray; hpcray.as_ray()

From then on `ray` and its submodules are, in the driver and in every worker,

    ours       what hpcray has, under Ray's name: `ray.ObjectRef is hpcray.ObjectRef`
    served     Ray's libraries (Tune, RLlib, ...): the pure Python files of the ray that the user
               has installed. Nothing of Ray is shipped here; its compiled core is never loaded
    stubs      names that those libraries mention: importing them works, using them is refused
    refused    what needs Ray's own core: the import says what to do instead

    finder.py     finds a module in `table.py`, and makes it
    table.py      which module is what; and the versions of Ray that are tested
    stubs.py      names that raise a sentence when they are used
    private/      what the libraries need of Ray's private modules

What must not go in here: anything that runs without the switch. Nothing else imports this package.
"""

from __future__ import annotations

import sys

from hpcray.as_ray.finder import install, is_installed, switch_on
from hpcray.as_ray.stubs import Importable

__all__ = ["install", "is_installed", "switch_on"]


class _Switch(Importable):
    """The package itself can be called: `hpcray.as_ray()`."""

    def __call__(self, *, any_version: bool = False) -> None:
        """Make `import ray` give hpcray, in this process and in the job's workers.

        To be called before anything imports ray. Without an installed ray the core works, and its
        libraries say what to install.

        Args:
          any_version: take a version of ray that was not tested (as HPCRAY_AS_RAY_ANY_VERSION=1).

        Raises:
          ImportError: ray itself is imported already, or is of a version that was not tested.
        """
        switch_on(any_version=any_version)


sys.modules[__name__].__class__ = _Switch
