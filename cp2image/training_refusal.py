"""What ends a training for good. Needs Ray Train and this package's errors alone.

Ray Train's controller imports the module that its callbacks stand in before any worker is started:
here that is next to nothing beside what Ray Train needs itself.
"""

from typing import Any

from ray.train import UserCallback

from cp2image.errors import Cp2ImageError


class StopOnRefusal(UserCallback):  # type: ignore[misc]
    """Ends a run whose workers refuse to go on: trying again cannot mend what they refuse."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first refusal; other failures (a killed worker, storage) are retried."""
        for error in worker_exceptions.values():
            refusal = refusal_of(error)
            if refusal is not None:
                raise refusal


def refusal_of(error: BaseException) -> Cp2ImageError | None:
    """Return the error of this package that Ray Train has wrapped, unless another try may help."""
    inner = getattr(error, "_base_exc", error)
    if isinstance(inner, Cp2ImageError) and not isinstance(inner, OSError):
        return inner
    return None
