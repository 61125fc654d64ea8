"""What other users of this machine can change, and files that they can neither change nor read."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ingine.errors import ConfigError


class Untrusted(Exception):
    """Somebody else can change what lies at a path. Its text says who, and which part of the path."""


def trusted(path: Path) -> Path:
    """`path` without symbolic links, if nobody but this user and root can change what lies there.

    Each folder above counts too: whoever can write it can put something else in its place. In a sticky folder
    such as /tmp only the owner of a file can do so. Raises Untrusted, and OSError where there is nothing.
    """
    resolved = path.resolve(strict=True)
    for part in (resolved, *resolved.parents)[:-1]:  # whoever owns / owns the machine
        if reason := _who_can_change(part.lstat()):
            raise Untrusted(f"{part} {reason}")
    return resolved


def make_private(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, with mode 0700, as the XDG specification says."""
    for part in (*reversed(folder.parents), folder):
        if not part.is_dir():
            try:
                part.mkdir(mode=0o700)
            except FileExistsError:
                if not part.is_dir():  # else another process was faster
                    raise


def own_folder(folder: Path, setting: str) -> Path:
    """`folder`, made if it is missing. One of ours that others can write is closed to them.

    Raises ConfigError, which names `setting`, if it is another user's or root lets others write it: what it
    holds may be theirs. The folders above are not looked at: a container's volume may be writable by all.
    """
    make_private(folder)
    found = folder.stat()
    if found.st_uid == os.geteuid() and _who_can_change(found, sticky_is_safe=False):
        with suppress(OSError):  # on a file system that is read-only, say
            folder.chmod(found.st_mode & 0o7755)
        found = folder.stat()
    if reason := _who_can_change(found, sticky_is_safe=False):
        raise ConfigError(
            f"{folder} {reason}: what it holds may be anybody's. Set {setting} to another folder"
        )
    return folder


def planted_by(path: Path) -> str | None:
    """The name of another user who has put `path` into a folder that is not his own. None: nobody has.

    What lies in a folder of another user is his to decide, and whoever goes there accepts that.
    """
    if os.name != "posix":
        return None
    owners = {path.lstat().st_uid, path.stat().st_uid}
    strangers = owners - {0, os.geteuid(), path.absolute().parent.stat().st_uid}
    return user_name(strangers.pop()) if strangers else None


def write_private(path: Path, text: str) -> None:
    """Replace the file `path`: whoever reads it sees the old text or the new one. Mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_private(path: Path) -> str | None:
    """The text of a file that only this user can read. None: there is no such file, it is another's, or it
    cannot be read."""
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
    import pwd  # here, as grp below, since a producer may run where there is none

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> tuple[str, list[str]]:
    """Its name, and the names of those who are in it beside the user whose own group it is."""
    import grp

    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return str(gid), []
    return group.gr_name, group.gr_mem


def _who_can_change(found: os.stat_result, *, sticky_is_safe: bool = True) -> str | None:
    """The predicate of a sentence about what was found. None: nobody but this user and root."""
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
    """Whether a group is root's, or one of those that many systems give to each user alone."""
    (name, members), user = _group(gid), user_name(uid)
    return gid == 0 or (name == user and set(members) <= {user})
