"""How many images a second one rank reads from streams of local tar and parquet files.

    python benchmarks/streams.py

JPEGs of 500 x 375 pixels in 16 shards, read as a run with a global batch of 256 reads them: encoded, by the main
process, once through from the page cache. For comparison the library `datasets` reads the same files.
"""

import argparse
import io
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from data_views import save_photos
from harness import append_results

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.spec import load_images

NUM_SHARDS, BATCH_SIZE = 16, 256


def write_shards(folder: Path, photos: list[bytes], num_images: int) -> None:
    """Write as many images to tar files as to parquet files."""
    for shard in range(NUM_SHARDS):
        contents = [photos[i % len(photos)] for i in range(num_images // NUM_SHARDS)]
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i, content in enumerate(contents):
                for suffix, member in (("jpg", content), ("json", b'{"caption": "a photo"}')):
                    info = tarfile.TarInfo(f"{shard:02}{i:06}.{suffix}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
        rows = [{"bytes": content, "path": None} for content in contents]
        type_ = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table({"image": pyarrow.array(rows, type_)})
        pyarrow.parquet.write_table(table, folder / f"{shard:02}.parquet", row_group_size=100, use_dictionary=False)


def images_a_second(pattern: str, num_ranks: int, num_images: int) -> float:
    """Rate of rank 0 of `num_ranks`, which reads its share of `num_images`."""
    images = load_images(f"stream:{pattern}")
    micro_batch = BATCH_SIZE // num_ranks
    sampler = StreamSampler(images, num_images, BATCH_SIZE, 0, micro_batch, rank=0, num_ranks=num_ranks)
    start = time.perf_counter()
    num_read = sum(key is not None for key in islice(sampler, num_images))
    return num_read / (time.perf_counter() - start)


def images_a_second_of_datasets(builder: str, column: str, files: list[str]) -> float:
    """Rate of the library `datasets`, which reads one file after the other."""
    rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    start = time.perf_counter()
    num_read = sum(1 for _ in rows)
    return num_read / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_384, help="in each kind of files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        photos = [path.read_bytes() for path in save_photos(folder / "photos", 1)]
        write_shards(folder, photos, args.images)
        size = sum(map(len, photos)) / len(photos)
        rows = []
        for kind, builder, column in (("tar", "webdataset", "jpg"), ("parquet", "parquet", "image")):
            files = sorted(map(str, folder.glob(f"*.{kind}")))
            rates = {
                "datasets": images_a_second_of_datasets(builder, column, files),
                **{f"rank 0 of {n}": images_a_second(f"{folder}/*.{kind}", n, args.images) for n in (1, 8)},
            }
            rows += [[kind, name, f"{rate:.0f}", f"{rate * size / 1e6:.0f}"] for name, rate in rates.items()]
    append_results(
        f"Streams of {NUM_SHARDS} local shards, JPEGs of {size / 1000:.0f} KB",
        ["files", "reader", "images / s", "MB / s"],
        rows,
        ["datasets", "pyarrow"],
    )


if __name__ == "__main__":
    main()
