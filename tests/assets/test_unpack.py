import io
import stat
import tarfile
import zipfile

import pytest

from subspace_jax.assets import UnsafeArchiveError
from subspace_jax.assets._unpack import unpack

HOSTILE_PATHS = ["../evil.txt", "a/../../evil.txt", "/evil.txt", "C:/evil.txt", "..\\evil.txt"]


def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            archive.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return path


def make_deb(path, content, name=b"data.tar.xz"):
    def member(name, raw):
        header = b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name, 0, 0, 0, b"100644", len(raw))
        return header + raw + b"\n" * (len(raw) % 2)

    # An odd-sized first member checks the alignment of the second.
    path.write_bytes(b"!<arch>\n" + member(b"debian-binary", b"2.0\n1") + member(name, content))
    return path


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "parent" / "folder"
    inner.mkdir(parents=True)
    return inner


def test_zip_tar_and_deb_unpack_to_the_same_files(tmp_path, folder):
    members = {"package/a.txt": b"one", "package/deep/b.bin": b"\x00\x01\x02"}
    data = make_tar(tmp_path / "data.tar.xz", members, "w:xz").read_bytes()
    for archive in (
        make_zip(tmp_path / "x.whl", members),
        make_tar(tmp_path / "x.tar.gz", members),
        make_deb(tmp_path / "x.deb", data),
    ):
        target = folder / archive.suffix[1:]
        target.mkdir()
        unpack(archive, target)
        assert files_below(target) == set(members)
        assert (target / "package/deep/b.bin").read_bytes() == b"\x00\x01\x02"


@pytest.mark.parametrize("hostile", HOSTILE_PATHS)
@pytest.mark.parametrize("kind", ["zip", "tgz", "deb"])
def test_member_outside_the_folder_is_refused_before_writing(tmp_path, folder, kind, hostile):
    members = {"good.txt": b"good", hostile: b"evil"}
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", members)
    elif kind == "tgz":
        archive = make_tar(tmp_path / "x.tgz", members)
    else:
        archive = make_deb(tmp_path / "x.deb", make_tar(tmp_path / "data.tar.xz", members, "w:xz").read_bytes())
    with pytest.raises(UnsafeArchiveError, match=r"evil\.txt"):
        unpack(archive, folder)
    assert files_below(folder.parent) == set()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_link_or_special_file_in_tar_is_refused(tmp_path, folder, kind):
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "good.txt"
    archive = make_tar(tmp_path / "x.tgz", {"good.txt": b"good", "link": info})
    with pytest.raises(UnsafeArchiveError, match="'link' is not a plain file"):
        unpack(archive, folder)
    assert files_below(folder) == set()


def test_symbolic_link_in_zip_is_refused(tmp_path, folder):
    info = zipfile.ZipInfo("link")
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeArchiveError, match="'link' is not a plain file"):
        unpack(archive, folder)


def test_debian_package_without_readable_content(tmp_path, folder):
    with pytest.raises(ValueError, match="zstandard"):
        unpack(make_deb(tmp_path / "x.deb", b"zz", name=b"data.tar.zst"), folder)
    with pytest.raises(ValueError, match=r"without data\.tar"):
        unpack(make_deb(tmp_path / "y.deb", b"zz", name=b"control.tar.xz"), folder)
    (tmp_path / "z.deb").write_bytes(b"not ar")
    with pytest.raises(ValueError, match="not a Debian package"):
        unpack(tmp_path / "z.deb", folder)


def test_unknown_kind_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"x\.rar"):
        unpack(tmp_path / "x.rar", folder)
