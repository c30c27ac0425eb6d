"""Files and folders that appear under their names whole, or not at all.

What is written is written in a hidden folder beside its place, then given its name in
one step. A process that is killed leaves its hidden folder behind; the next one that
writes beside it takes that away, as the lock on it went with the process.
"""

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
import zlib

try:
    import fcntl
except ImportError:  # Not on Windows, where nothing that is left behind is taken away.
    fcntl = None  # type: ignore[assignment]


class Draft:
    """A hidden folder beside `path`, for one thing that shall be there.

    Attributes:
      name: The folder's own.
      inside: Where to write.
    """

    def __init__(self, path: str):
        parent = os.path.dirname(path)
        os.makedirs(parent, exist_ok=True)
        _take_away_abandoned(parent)
        self._path = path
        self._folder, self._lock = _new_folder(parent)
        self.name = os.path.basename(self._folder)
        self.inside = os.path.join(self._folder, os.path.basename(path))

    def publish(self) -> None:
        """Gives what is inside its name.

        Raises:
          OSError: If that is a folder, and there is something of its name.
        """
        os.replace(self.inside, self._path)

    def close(self) -> None:
        """Takes the hidden folder away, with what may still be inside."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# Some file systems that machines share have locks within one machine only.
_ENDING = f".{zlib.crc32(socket.gethostname().encode()):08x}.hk_stack.tmp"
_DAY = 24 * 60 * 60


def _take_away_abandoned(parent: str) -> None:
    """Hidden folders that nobody holds a lock on: of this machine, or a day old."""
    with os.scandir(parent) as entries:
        folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    for folder in folders:
        if not re.fullmatch(r"\.\w{32}\.\w{8}\.hk_stack\.tmp", folder.name):
            continue
        with contextlib.suppress(OSError):
            is_old = folder.stat().st_mtime < time.time() - _DAY
            if is_old or folder.name.endswith(_ENDING):
                lock = _locked(folder.path)
                shutil.rmtree(folder.path, ignore_errors=True)
                os.close(lock)


def _new_folder(parent: str) -> tuple[str, int | None]:
    """A hidden folder, and the lock that says that it is in use."""
    while True:
        folder = os.path.join(parent, f".{uuid.uuid4().hex}{_ENDING}")
        os.mkdir(folder)
        try:
            lock = _locked(folder)
        except (BlockingIOError, FileNotFoundError):  # Taken away before the lock.
            continue
        except OSError:  # There are no locks here: nobody takes it away, then.
            return folder, None
        if os.path.isdir(folder):
            return folder, lock
        os.close(lock)


def _locked(folder: str) -> int:
    """A descriptor that holds the lock on a folder until it is closed."""
    if fcntl is None:
        raise OSError("there are no locks on folders here")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
