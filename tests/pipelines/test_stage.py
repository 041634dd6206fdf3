"""A stage becomes an artifact by one program at a time."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.session import Session
from pipelines import stage
from pipelines.config import Resources
from pipelines.stage import Made, Pipeline, Workspace, only_writer
from pipelines.sweep_record import Record, read_records
from pipelines.tracking import Tracker
from tests.pipelines.test_cli import ROOT
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

HOLDER = """
import sys, time
from pipelines.stage import only_writer
from vqvae_core.storage import Folder
with only_writer(Folder.of(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """One without Ray."""
    monkeypatch.setattr(Pipeline, "cpus_per_worker", lambda self: 1)
    root = Folder.of(tmp_path / "root")
    return Pipeline(root, Resources(), Session(), Tracker(root, "test", {}, "", enabled=False))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another program that holds a folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "made")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def making(pipeline: Pipeline, build: Any) -> Any:
    return pipeline.make("some", version=1, kind="Some", recipe={}, inputs={}, build=build)


@pytest.mark.slow
def test_a_folder_has_one_program_at_a_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Until that one ends, also by a kill."""
    folder = Folder.of(tmp_path / "made")
    said = rf"expected nobody else at work in .*/made, found another program \(process {holder.pid} of this machine\)"
    with pytest.raises(InputError, match=said), only_writer(folder):
        raise AssertionError("it was let in")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with only_writer(folder):
        folder.write("a", b"x")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["a"]


def test_the_second_program_neither_sweeps_nor_works(pipeline: Pipeline, tmp_path: Path) -> None:
    unfinished = []

    def second(space: Workspace, run: Any) -> Made:
        raise AssertionError("it was let in")

    def first(space: Workspace, run: Any) -> Made:
        place = Path(space.folder.uri)
        unfinished.append(place / ".part.tmp")
        unfinished[0].write_bytes(b"half")
        with pytest.raises(InputError, match="expected nobody else at work in "):
            making(pipeline, second)
        assert unfinished[0].exists()
        return Made([], {}, 0.0)

    making(pipeline, first)
    assert making(pipeline, second).manifest.kind == "Some"


def test_what_another_program_made_meanwhile_is_reused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made = making(pipeline, lambda space, run: Made([], {}, 0.0))
    look, looked = Pipeline._reusable, []

    def too_early(self: Pipeline, *arguments: Any) -> Any:
        looked.append(arguments)
        return None if len(looked) == 1 else look(self, *arguments)

    monkeypatch.setattr(Pipeline, "_reusable", too_early)
    again = making(pipeline, lambda space, run: pytest.fail("it was made again"))
    assert again.manifest.provenance == made.manifest.provenance and pipeline.reports[-1].reused


def test_nothing_is_left_where_nothing_was_made(pipeline: Pipeline, tmp_path: Path) -> None:
    def refuses(space: Workspace, run: Any) -> Made:
        raise InputError("expected a source")

    with pytest.raises(InputError, match="expected a source"):
        making(pipeline, refuses)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_file_system_without_locks_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(stage.fcntl, "flock", refuses)
    with only_writer(Folder.of(tmp_path / "made")):
        pass
    with only_writer(Folder("s3://bucket/made")):
        pass


def test_an_input_that_a_manifest_does_not_name(pipeline: Pipeline, tmp_path: Path, capsys) -> None:
    """Its artifact is made again, and not an error."""
    source = pipeline.make("source", version=1, kind="Source", recipe={}, inputs={},
                           build=lambda space, run: Made([], {}, 0.0))  # fmt: skip
    made = pipeline.make("some", version=1, kind="Some", recipe={}, inputs={"source": source},
                         build=lambda space, run: Made([], {}, 0.0))  # fmt: skip
    place = Path(made.folder.path("manifest.json"))
    fields = json.loads(place.read_text())
    fields["inputs"] = {}
    place.write_text(json.dumps(fields))
    pipeline.make("some", version=1, kind="Some", recipe={}, inputs={"source": source},
                  build=lambda space, run: Made([], {}, 0.0))  # fmt: skip
    assert "made again, since its input source now has other contents" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"{", b'{"number": 1, "values": {}, "colour": 2}', b"[]", b"[" * 99_999])
def test_a_record_of_a_trial_that_is_none(tmp_path: Path, text: bytes) -> None:
    folder = Folder.of(tmp_path)
    Record(number=0, values={"a": 1}).write(folder)
    assert read_records(folder)[0].values == {"a": 1}
    folder.write("trials/trial-00001.json", text)
    with pytest.raises(
        InputError, match="expected what is known of a trial in .*trial-00001.json, but: .*move it away"
    ):
        read_records(folder)
