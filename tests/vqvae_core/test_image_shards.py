import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vqvae_core.artifacts import ArtifactError
from vqvae_core.image_shards import Sample, read_tar, write_tar
from vqvae_core.images import encode


def samples(count: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            key=f"level-{number:03d}",
            image_format="png",
            data=encode(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "png"),
            facts={"label": number, "level": "ä"},
        )
        for number in range(count)
    ]


def test_round_trip() -> None:
    assert list(read_tar(write_tar(samples()), "here")) == samples()


def test_same_samples_same_bytes() -> None:
    assert write_tar(samples()) == write_tar(samples())
    with tarfile.open(fileobj=io.BytesIO(write_tar(samples()))) as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "root", 0o644)}


def test_the_bytes_are_those_of_the_tarfile_module() -> None:
    several = [*samples(40), dataclasses.replace(samples()[0], key="k" * 90, data=bytes(3 * 512))]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in several:
            facts = json.dumps(sample.facts, sort_keys=True, separators=(",", ":")).encode()
            for name, data in ((f"{sample.key}.png", sample.data), (f"{sample.key}.json", facts)):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                member.uname = member.gname = "root"
                tar.addfile(member, io.BytesIO(data))
    assert write_tar(several) == buffer.getvalue()
    with pytest.raises(ValueError, match="key must be 1 to 90 letters, digits, - and _, was 'a/b'"):
        write_tar([dataclasses.replace(samples()[0], key="a/b")])


@pytest.mark.filterwarnings("ignore")
def test_the_webdataset_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(write_tar(samples()))
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples()]
    assert [sample["png"] for sample in read] == [sample.data for sample in samples()]
    assert read[1]["json"] == b'{"label":1,"level":"\\u00e4"}'


def test_a_cut_tar() -> None:
    data = write_tar(samples())
    with pytest.raises(ArtifactError, match="here"):
        list(read_tar(data[: len(data) // 2], "here"))


def test_a_foreign_member_is_refused_and_does_not_run() -> None:
    buffer = io.BytesIO(write_tar(samples(1)).rstrip(b"\0"))
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("x.pyd")
        payload = b"cos\nsystem\n(S'exit 1'\ntR."
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(ArtifactError, match=r"expected pairs of an image and a .json in here, found 'x.pyd'"):
        list(read_tar(buffer.getvalue(), "here"))


def test_an_image_without_its_facts() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("x.png")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ArtifactError, match="expected x.json at the end of here"):
        list(read_tar(buffer.getvalue(), "here"))


@pytest.mark.parametrize("facts", [b"[1]", b"{", b"[" * 100_000])
def test_facts_that_are_no_object(facts: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("x.png", b"p"), ("x.json", facts)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ArtifactError, match="expected a JSON object in x.json of here"):
        list(read_tar(buffer.getvalue(), "here"))
