"""Files of `torch.save`: what we write torch reads, what torch writes we read, and code is never run."""

import pickle
import struct
import zipfile

import pytest
import torch

from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.convert.torch_file import read_torch_file, write_torch_file
from tests.convert.files import assert_same_bits

TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.randn(5).bfloat16(),
    "float64": torch.randn(3, 1, 2, dtype=torch.float64),
    "int64": torch.tensor([1, -1]),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(1, 0, 4),
    "nan": torch.tensor([float("nan"), -0.0]),
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(mmap, tmp_path):
    content = {
        "teacher": {name: LazyTensor.of(tensor) for name, tensor in TENSORS.items()},
        "more": LazyTensor.of(TENSORS["scalar"]),
    }
    write_torch_file(content, tmp_path / "a.pth")
    found = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
    assert found.keys() == {"teacher", "more"}
    assert_same_bits(found["teacher"], TENSORS)
    assert all(tensor.stride() == TENSORS[name].stride() for name, tensor in found["teacher"].items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found["teacher"].values() if tensor.numel()) or not mmap


def test_the_archive_is_sound(tmp_path):
    write_torch_file({name: LazyTensor.of(tensor) for name, tensor in TENSORS.items()}, tmp_path / "a.pth")
    torch.save(TENSORS, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as ours, zipfile.ZipFile(tmp_path / "b.pth") as theirs:
        assert ours.testzip() is None
        records = {name.partition("/")[2]: ours.read(name) for name in ours.namelist()}
        for name in theirs.namelist():
            _, _, record = name.partition("/")
            if record.startswith("data/") or record in ("version", "byteorder"):
                assert records[record] == theirs.read(name), record


@pytest.mark.parametrize("new_format", [True, False])
def test_we_read_what_torch_writes(new_format, tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    nested = {
        "a": TENSORS,
        "views": {"row": matrix[1], "columns": matrix[:, 1:3], "turned": matrix.t()},
        "step": 3,
        "none": None,
    }
    nested["parameter"] = torch.nn.Parameter(torch.randn(2))
    torch.save(nested, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    found = read_torch_file(tmp_path / "a.pth")
    assert found.pop("step") is None and found.pop("none") is None
    expected = {f"a.{name}": tensor for name, tensor in TENSORS.items()}
    expected |= {"views.row": matrix[1], "views.columns": matrix[:, 1:3], "views.turned": matrix.t()}
    assert_same_bits(read_all(found), expected | {"parameter": nested["parameter"].detach()})


def test_a_file_saved_on_a_gpu_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as source, zipfile.ZipFile(tmp_path / "cuda.pth", "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                # The only difference that a GPU makes in the file: the device's name, preceded by its length.
                content = content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            target.writestr(record.filename, content)
    assert_same_bits(read_all(read_torch_file(tmp_path / "cuda.pth")), TENSORS)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("archive", r"a\.pth holds more than tensors \((\w+\.)?open\), and opening it could run code"),
        ("before archives", r"a\.pth holds more than tensors \((\w+\.)?open\), and opening it could run code"),
        ("plain pickle", r"a\.pth is damaged, or is no file of torch.save"),
    ],
)
def test_code_is_refused_and_not_run(kind, says, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "a.pth"
    content = {"weight": torch.ones(2), "payload": Payload(trace)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(ValueError, match=says) as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "plain pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_files(share, new_format, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a\.pth is damaged, or is no file of torch.save") as error:
        read_torch_file(path)
    assert "\n" not in str(error.value)


def test_files_that_end_anywhere(tmp_path):
    """Where it ends decides which error torch raises; some name no file."""
    path = tmp_path / "a.pth"
    torch.save({f"blocks.{number}.weight": torch.ones(32, 32) for number in range(40)}, path)
    whole = path.read_bytes()
    for end in range(1, len(whole), len(whole) // 30):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.pth is damaged, or is no file of torch.save"):
            read_torch_file(path)


def test_two_entries_of_one_name(tmp_path):
    torch.save({"teacher": {"norm.bias": torch.ones(2)}, "teacher.norm.bias": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is damaged.*\(two entries have the name teacher.norm.bias\)"):
        read_torch_file(tmp_path / "a.pth")


def test_tensors_without_values_are_no_tensors(tmp_path):
    torch.save({"weight": torch.ones(2), "meta": torch.ones(2, device="meta")}, tmp_path / "a.pth")
    content = read_torch_file(tmp_path / "a.pth")
    assert content["weight"] is not None and content["meta"] is None


@pytest.mark.parametrize("new_format", [True, False])
def test_code_among_the_builtins_is_named(new_format, tmp_path):
    """torch names these without their module."""

    class Evaluated:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'trace')!r}, 'w')",)

    torch.save({"payload": Evaluated()}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"a\.pth holds more than tensors \(eval\), and opening it could run code"):
        read_torch_file(tmp_path / "a.pth")
    assert not (tmp_path / "trace").exists()


def test_numbers_that_changed_in_transport(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is damaged.*Bad CRC-32"):
        read_torch_file(path)


def test_storages_outside_of_their_records(tmp_path):
    """A pickle that says that a tensor has more numbers than the archive."""
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(3), "other": torch.ones(500)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                assert content.count(b"cpuq") + content.count(b"K\x03") >= 2
                content = content.replace(b"K\x03", b"K\x30")
            target.writestr(record.filename, content)
    with pytest.raises(ValueError, match=r"b\.pth is damaged"):
        read_torch_file(tmp_path / "b.pth")


def test_compressed_archives_and_other_objects(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(ValueError, match=r"b\.pth is damaged.*data.pkl is compressed"):
        read_torch_file(tmp_path / "b.pth")
    torch.save(torch.ones(2), tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth holds one object and no tensors by name; save a state dict"):
        read_torch_file(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(struct.pack("<QQ", 1, 2) * 100)
    with pytest.raises(ValueError, match=r"d\.pth is damaged"):
        read_torch_file(tmp_path / "d.pth")


def test_dtypes_that_have_no_place(tmp_path):
    content = {"a": LazyTensor.full((2,), 0, torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"a tensor of dtype torch.float8_e4m3fn cannot be written to a\.pth"):
        write_torch_file(content, tmp_path / "a.pth")
