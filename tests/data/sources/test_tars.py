"""Tar files are read by place: the right images, names and labels, or one clear line."""

import io
import tarfile

import pytest

from dinov3_hf.data.sources import tars
from dinov3_hf.data.sources.spec import load_images
from tests.data.sources.writing import encoded, number_of, write_tar


def numbers(images) -> list[int]:
    return [number_of(images.image(i)) for i in range(len(images))]


def test_images_names_and_labels(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"shard-{shard:03}.tar", range(10 * shard, 10 * shard + 10))
    images = load_images(f"{tmp_path}/shard-{{000..001}}.tar", labelled=True)
    assert numbers(images) == list(range(20))
    assert images.content(13) == encoded(13)
    assert images.name(13) == f"{tmp_path}/shard-001.tar/0013.png"
    assert images.class_names == ["0", "1", "2"]
    assert images.labels.tolist() == [number % 3 for number in range(20)]
    assert len(load_images(tmp_path)) == 20  # a folder of nothing but tar files
    write_tar(tmp_path / "val.tar", range(3))
    assert [len(load_images(tmp_path, split)) for split in ("train", "test")] == [20, 3]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_formats_long_names_and_other_members(format, tmp_path):
    folder = "a" * 40 + "/" + "b" * 70
    names = [f"{folder}/{'c' * 30}.JPG", f"{folder}/._{'c' * 9}.jpg", "d.seg.png", "notes.txt"]
    if format == tarfile.PAX_FORMAT:
        names.append("ünï/" + "e" * 150 + ".png")
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        directory = tarfile.TarInfo("folder.png")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "d.seg.png"
        tar.addfile(link)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(encoded(number))
            tar.addfile(info, io.BytesIO(encoded(number)))
    images = load_images(tmp_path / "x.tar")
    expected = [name for name in names if name.endswith(("JPG", "png"))]
    assert [images.name(i) for i in range(len(images))] == [f"{tmp_path}/x.tar/{name}" for name in expected]
    assert numbers(images) == [names.index(name) for name in expected]
    with tarfile.open(tmp_path / "x.tar") as tar:  # the standard library finds the same places
        places = {member.name: member.offset_data for member in tar.getmembers()}
    assert [places[name] for name in expected] == images.starts.tolist()


def test_index_is_kept_for_the_next_run(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", range(5))
    first = load_images(path, labelled=True)

    def scan(path):
        raise AssertionError("read twice")

    monkeypatch.setattr(tars, "_scan", scan)
    again = load_images(path, labelled=True)
    assert numbers(again) == list(range(5))
    assert again.fingerprint() == first.fingerprint()
    assert (again.labels == first.labels).all()
    monkeypatch.undo()
    write_tar(path, range(6))
    assert len(load_images(path)) == 6  # another file of the same name
    assert load_images(path).fingerprint() != first.fingerprint()


def test_without_a_place_to_keep_the_index(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert len(load_images(write_tar(tmp_path / "x.tar", range(5)))) == 5


def test_files_that_cannot_be_read(tmp_path):
    def refused(path, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as caught:
            load_images(path, **options)
        assert "\n" not in str(caught.value)

    whole = write_tar(tmp_path / "whole.tar", range(3))
    with tarfile.open(whole) as tar:
        *_, last = (member for member in tar.getmembers() if member.name.endswith("png"))
    for name, length in (("header", last.offset + 100), ("content", last.offset_data + 10)):
        cut = tmp_path / f"{name}.tar"
        cut.write_bytes(whole.read_bytes()[:length])
        refused(cut, rf"{name}\.tar cannot be read as a tar file \(.*\); copy it again, uncompressed, or leave it out")
    damaged = bytearray(whole.read_bytes())
    damaged[last.offset : last.offset + 20] = b"x" * 20
    (tmp_path / "damaged.tar").write_bytes(damaged)
    refused(tmp_path / "damaged.tar", r"damaged\.tar cannot be read as a tar file \(bad checksum\)")
    (tmp_path / "text.tar").write_text("no archive")
    refused(tmp_path / "text.tar", r"text\.tar cannot be read as a tar file")
    (tmp_path / "empty.tar").touch()
    refused(tmp_path / "empty.tar", r"empty\.tar cannot be read as a tar file")
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(whole, "a.png")
    refused(tmp_path / "x.tar", "cannot be read as a tar file")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(whole, "a.txt")
    refused(tmp_path / "texts.tar", "holds no images; their names must end in .jpg", FileNotFoundError)
    refused(
        write_tar(tmp_path / "unlabelled.tar", range(2), labelled=False),
        r"unlabelled\.tar/0000\.png has no label; labels need a \.cls member beside each image",
        labelled=True,
    )
