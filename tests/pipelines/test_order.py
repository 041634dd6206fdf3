"""The program that compares the order of samples for several numbers of ranks."""

import re
from pathlib import Path

import pytest

from pipelines import order as program
from tests.vqvae_core.shards import make_images
from vqvae_core import order as laws
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

OPTIONS = ["--batch-size", "16", "--num-lanes", "8", "--window", "5"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_images(Folder.of(tmp_path_factory.mktemp("images")), [30, 41, 9]).artifact.folder.uri


@pytest.mark.slow
def test_hashes_are_one_for_all_numbers_of_ranks(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    program.main([artifact, *OPTIONS, "--decode"])
    said = capsys.readouterr().out
    assert said.startswith("80 samples, 5 steps an epoch, 0 left out\nin no step: 4 of validation\n")
    for kind in ("", ", pictures"):
        hashes = re.findall(rf"^(?:\d ranks|changing ranks){kind}: ([0-9a-f]{{16}})$", said, re.MULTILINE)
        assert len(hashes) == 5
        assert len(set(hashes)) == 1
    assert said.endswith("the same samples in each of 5 steps\n")


def test_an_order_that_follows_the_ranks_is_found(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: each rank of more than one takes other lanes."""
    whole = laws.lanes_of

    def broken(rank: int, world_size: int, config: laws.OrderConfig) -> range:
        lanes = whole(rank, world_size, config)
        return whole((rank + 1) % world_size, world_size, config) if world_size == 2 and rank == 0 else lanes

    monkeypatch.setattr(program, "lanes_of", broken)
    with pytest.raises((SystemExit, InputError), match="expected .* samples in"):
        program.main([artifact, *OPTIONS])


def test_messages(artifact: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a number of workers that divides num_lanes 8, found 3"):
        program.main([artifact, *OPTIONS, "--world-sizes", "3"])
    with pytest.raises(InputError, match="expected an order of samples, but: num_lanes must divide batch_size 65"):
        program.main([artifact, "--batch-size", "65", "--num-lanes", "8"])
    with pytest.raises(InputError, match="expected numbers of ranks of at least 1"):
        program.main([artifact, *OPTIONS, "--world-sizes", "0"])
