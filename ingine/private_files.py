"""Detects files that other users of this machine can change, and writes files that they cannot access."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ingine.errors import ConfigError


class Untrusted(Exception):
    """Another user can change what lies at a path. The message says who, and which part of the path."""


def trusted(path: Path) -> Path:
    """Resolve the symbolic links of `path`, and check that only this user and root can change it.

    Each parent folder is checked too, since a user who can write to it can replace what it contains. In a
    sticky folder such as /tmp only the owner of a file can do so. Raises Untrusted, and OSError if nothing
    is there.
    """
    resolved = path.resolve(strict=True)
    for part in (resolved, *resolved.parents)[:-1]:  # the owner of / controls the whole machine
        if reason := _who_can_change(part.lstat()):
            raise Untrusted(f"{part} {reason}")
    return resolved


def make_private(folder: Path) -> None:
    """Create `folder` and its missing parents with mode 0700, as the XDG specification says."""
    for part in (*reversed(folder.parents), folder):
        if not part.is_dir():
            try:
                part.mkdir(mode=0o700)
            except FileExistsError:
                if not part.is_dir():  # otherwise another process created it first
                    raise


def own_folder(folder: Path, setting: str) -> Path:
    """Create `folder` if it is missing. If it is this user's and others can write to it, revoke that.

    Returns `folder`. Raises ConfigError, which names `setting`, if the folder is another user's or others can
    still write to it: its files may be theirs. Parent folders are not checked, since a container's volume may
    be writable by all users.
    """
    make_private(folder)
    found = folder.stat()
    if found.st_uid == os.geteuid() and _who_can_change(found, sticky_is_safe=False):
        with suppress(OSError):  # on a file system that is read-only, say
            folder.chmod(found.st_mode & 0o7755)
        found = folder.stat()
    if reason := _who_can_change(found, sticky_is_safe=False):
        raise ConfigError(f"{folder} {reason}: its files may be anybody's. Set {setting} to another folder")
    return folder


def planted_by(path: Path) -> str | None:
    """Return the name of another user who owns `path` and not the folder that it lies in, or None.

    The owner of a folder decides what lies in it, and using that folder means accepting it.
    """
    if os.name != "posix":
        return None
    owners = {path.lstat().st_uid, path.stat().st_uid}
    strangers = owners - {0, os.geteuid(), path.absolute().parent.stat().st_uid}
    return user_name(strangers.pop()) if strangers else None


def write_private(path: Path, text: str) -> None:
    """Replace the file `path` atomically: readers see either the old text or the new. Mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_private(path: Path) -> str | None:
    """Return the text of a file that only this user can read. None if there is no such file, others can
    access it, it is another user's, or it cannot be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with (
        suppress(OSError),
        open(path, encoding="utf-8", errors="replace", opener=lambda name, _: os.open(name, flags)) as file,
    ):
        found = os.fstat(file.fileno())
        private = stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077
        return file.read() if private and found.st_uid == os.geteuid() else None
    return None


def user_name(uid: int) -> str:
    import pwd  # imported here, like grp below: a producer may run where these modules do not exist

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> tuple[str, list[str]]:
    """Return a group's name and the names of its members, without users whose primary group it is."""
    import grp

    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return str(gid), []
    return group.gr_name, group.gr_mem


def _who_can_change(found: os.stat_result, *, sticky_is_safe: bool = True) -> str | None:
    """Describe who else can change a file, as the predicate of a sentence. None if only this user and root
    can.
    """
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to another user, {user_name(found.st_uid)}"
    if sticky_is_safe and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "can be written by every user"
    if found.st_mode & stat.S_IWGRP and not _is_group_of_one(found.st_gid, found.st_uid):
        return f"can be written by a group, {_group(found.st_gid)[0]}"
    return None


def _is_group_of_one(gid: int, uid: int) -> bool:
    """Whether a group is root's, or a private group such as many systems create for each user."""
    (name, members), user = _group(gid), user_name(uid)
    return gid == 0 or (name == user and set(members) <= {user})
