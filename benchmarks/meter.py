"""Peak memory of a piece of work in this process. Standard library only: it also runs in a peer's environment."""

from typing import Self


def _kib(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


class Peak:
    """Within a ``with`` block: the most bytes that the process held, and how many more than at the start (Linux)."""

    most = extra = 0

    def __enter__(self) -> Self:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark starts anew
        self._before = _kib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.most = 1024 * _kib("VmHWM")
        self.extra = self.most - 1024 * self._before
