"""Unpacks wheels, tarballs and Debian packages into a folder, refusing members that would leave it."""

import io
import pathlib
import stat
import tarfile
import zipfile


class UnsafeArchiveError(ValueError):
    """An archive holds a member that would be written outside its folder, a link or a special file."""


_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks an archive into an existing folder, after checking every member.

    Args:
        archive: a `.whl`, `.zip`, `.tar.gz`, `.tgz` or `.deb` file.
        folder: existing folder that receives the members.

    Raises:
        UnsafeArchiveError: a member has an absolute path, climbs out with `..`, is a link or a special file;
            nothing has been written then.
        ValueError: the kind of archive is not known, or a Debian package has no readable content.
    """
    name = archive.name
    if name.endswith((".whl", ".zip")):
        _unpack_zip(archive, folder)
    elif name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(archive) as tar:
            _unpack_tar(tar, archive, folder)
    elif name.endswith(".deb"):
        with tarfile.open(fileobj=io.BytesIO(_debian_content(archive))) as tar:
            _unpack_tar(tar, archive, folder)
    else:
        raise ValueError(f"{name}: not a .whl, .zip, .tar.gz, .tgz or .deb file")


def _check_path(archive: pathlib.Path, member: str) -> None:
    path = pathlib.PurePosixPath(member)
    windows = pathlib.PureWindowsPath(member)
    if path.is_absolute() or windows.drive or "\\" in member or ".." in path.parts:
        raise UnsafeArchiveError(
            f"{archive.name}: member {member!r} would be written outside the folder; nothing was unpacked"
        )


def _unpack_zip(archive: pathlib.Path, folder: pathlib.Path) -> None:
    with zipfile.ZipFile(archive) as source:
        for member in source.infolist():
            _check_path(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnsafeArchiveError(f"{archive.name}: member {member.filename!r} is not a plain file")
        source.extractall(folder)


def _unpack_tar(source: tarfile.TarFile, archive: pathlib.Path, folder: pathlib.Path) -> None:
    for member in source.getmembers():
        _check_path(archive, member.name)
        if not (member.isfile() or member.isdir()):
            raise UnsafeArchiveError(f"{archive.name}: member {member.name!r} is not a plain file")
    source.extractall(folder, filter="data")


def _debian_content(archive: pathlib.Path) -> bytes:
    """Returns the bytes of `data.tar.*` inside a Debian package, which is an `ar` archive."""
    raw = archive.read_bytes()
    if not raw.startswith(_AR_MAGIC):
        raise ValueError(f"{archive.name}: not a Debian package")
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(raw):
        name = raw[position : position + 16].decode("ascii").strip().rstrip("/")
        size = int(raw[position + 48 : position + 58])
        start = position + _AR_HEADER
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise ValueError(
                    f"{archive.name}: its content is zstandard-compressed, which Python's tarfile does not "
                    "read here; install the package with the system's package manager instead"
                )
            return raw[start : start + size]
        # Members start at even offsets.
        position = start + size + size % 2
    raise ValueError(f"{archive.name}: a Debian package without data.tar")
