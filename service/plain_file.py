"""Read a small file that anyone who may write to a repository has put there.

What it says is for the caller to judge; here is only that it is a file. A link is not followed, a
pipe not waited for, and nothing read without end.
"""

import errno
import os
import stat
from pathlib import Path


def read(path: Path, max_bytes: int) -> bytes | None:
    """Return a file's content; None where there is no file.

    Raises:
        OSError: it cannot be read, is not a plain file, or has more than `max_bytes`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has over {max_bytes} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)
