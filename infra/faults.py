"""What fails outside, in one line with what to do: a full disk, a read-only one, a server that does not recover."""

import errno
import os
from dataclasses import dataclass

# By error number. Libraries that are not Python's own keep its text only.
DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: "mount it writable",
    errno.EACCES: "allow writing there",
    errno.EIO: "its disk is failing: move the store to another",
}


@dataclass(frozen=True)
class Fault:
    """``lasting``: until somebody acts. Others may pass, so trying again is worth it."""

    line: str
    lasting: bool


def fault_of(error: BaseException) -> Fault | None:
    """The fault that an error, or what caused it, tells of; None where it tells of none."""
    from botocore.exceptions import BotoCoreError, ClientError

    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())[:300]
        if isinstance(seen, BotoCoreError | ClientError):
            return Fault(f"S3 did not answer as it should ({text}); the same command continues", lasting=False)
        for number, advice in DISK.items():
            said = os.strerror(number)
            if getattr(seen, "errno", None) == number or said in text:
                place = getattr(seen, "filename", None)
                return Fault(f"{place or 'a disk'}: {said}: {advice}; the same command continues", lasting=True)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None
