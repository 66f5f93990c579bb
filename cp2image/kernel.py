"""How loops over batches are compiled. Ground floor: numba.

Compiled kernels are kept in ``__pycache__``. numba looks only at a kernel's own file: after a
change in a kernel that those of other files call, delete the ``*.nbi`` files there.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compile_kernel(function: Function) -> Function:
    """Compile a loop over a batch: one thread, without the GIL, cached on disk.

    Divisions by zero give inf and NaN, as in numpy.
    """
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))


def compile_reduction(function: Function) -> Function:
    """Compile as `compile_kernel`, letting sums be taken in any order so that they vectorise."""
    options = {"reassoc", "contract", "nsz"}
    compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath=options)(function)
    return cast(Function, compiled)
