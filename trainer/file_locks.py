"""File locks of the operating system, which some file systems of clusters do not have."""

import errno
import fcntl
from typing import IO

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""What flock says on Lustre without ``-o flock``, on NFS without a lock service, and on others."""


class LockedError(Exception):
    """Another process holds the lock."""


class NoLocksError(Exception):
    """The file system has no locks."""


def lock_file(file: IO, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file until it is closed.

    Args:
        shared: allow others that are shared.
        wait: wait for a lock that another process holds.

    Raises:
        LockedError: another process holds it, without ``wait``.
        NoLocksError: the file system has none.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError from None
        raise
