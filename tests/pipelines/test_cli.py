"""What a user sees who types something that does not fit: one line, exit code 2, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.config import config_from_manifest, config_to_manifest
from pipelines.presets import PRESETS
from vqvae_core.errors import InputError

ROOT = Path(__file__).parents[2]


def full(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines" / "full.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "doom48"], r"expected a preset out of doom84, .*, found 'doom48' \(did you mean doom84\?\)"),
        (["--train.step", "3"], r"found --train.step \(did you mean --train.steps\?\); --help lists all fields"),
        (["--train.steps", "many"], "expected a value of type int for --train.steps, found many"),
        (["--train.steps"], "expected a value of type int for --train.steps, found none"),
        (["--shard.resize", "squash"], "expected one of crop, exact for --shard.resize, found squash"),
        (["--shard.max-train-images", "x"], "expected a value of type int or none for --shard.max-train-images"),
        (["--data.maps"], "maps must name at least one Freedoom map, for example E1M3 or MAP08$"),
        (["--train.learning-rate", "nan"], "learning_rate must be a number above 0, was nan"),
        (["--train.steps", "0"], "steps must be at least 1, was 0"),
        (["--train.batch-size", "10"], "num_lanes must divide batch_size 10, was 4; the largest that does is 2"),
        (["--shard.image-size", "83"], "image_size must be a multiple of 4, was 83"),
        (["--data.maps", "E9M9"], "maps must be named E1M1 to E4M9 or MAP01 to MAP32, found 'E9M9'"),
        (["--source", "x"], "expected no --source for the preset doom84, whose frames are made live"),
        (["--root"], "expected a value after --root, found none"),
        (["--config", "nowhere.json"], "expected a manifest.json with a config at nowhere.json"),
        (["stray"], "expected --FIELD VALUE pairs, found stray"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli.parse(arguments)


def test_overrides() -> None:
    options = cli.parse(["--preset", "smoke", "--root=x", "--train.batch-size", "16", "--vqvae.quantizer.num-codes=64",
                         "--data.maps", "E1M1", "E1M2", "--resources.use-gpu", "--no-track"])  # fmt: skip
    config = options.config
    assert (config.train.batch_size, config.vqvae.quantizer.num_codes, config.data.maps) == (16, 64, ("E1M1", "E1M2"))
    assert (options.root, options.track, config.resources.use_gpu) == ("x", False, True)
    assert config.train_prior == PRESETS["smoke"][0].train_prior


def test_the_root_where_none_is_given() -> None:
    """Another kind of source has another: its report is no preset's."""
    assert cli.parse(["--preset", "smoke"]).root == "runs/smoke"
    assert cli.parse(["--preset", "dmlab84", "--source", "/x"]).root == "runs/dmlab84"
    assert cli.parse(["--source-kind", "class_folders", "--source", "/x"]).root == "runs/doom84-class_folders"
    assert cli.parse(["--source-kind", "class_folders", "--source", "/x", "--root", "mine"]).root == "mine"


def test_the_name_of_a_run() -> None:
    """A report of somebody's own pictures is not called as the demo's."""
    assert cli.parse(["--preset", "smoke"]).title == "smoke"
    assert cli.parse(["--source-kind", "class_folders", "--source", "/x"]).title == "doom84, class_folders"


def test_a_manifest_says_not_where_to(tmp_path: Path) -> None:
    place = tmp_path / "manifest.json"
    place.write_text(json.dumps({"provenance": {"config": config_to_manifest(PRESETS["smoke"][0])}}))
    with pytest.raises(InputError, match="expected --root FOLDER with --config"):
        cli.parse(["--config", str(place)])
    assert cli.parse(["--config", str(place), "--root", "x"]).config == PRESETS["smoke"][0]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"provenance": {"config": {"data": [], "source": "vizdoom"}}}', "[" * 99999]
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    place = tmp_path / "manifest.json"
    place.write_text(text)
    with pytest.raises(InputError, match="expected a manifest.json with a config at"):
        cli.parse(["--config", str(place), "--root", "x"])


def test_the_source_is_named_by_its_place() -> None:
    assert cli.parse(["--preset", "dmlab84", "--source", "/somewhere"]).config.data.path == "/somewhere"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_survives_its_manifest(preset: str) -> None:
    config = PRESETS[preset][0]
    assert config_from_manifest(json.loads(json.dumps(config_to_manifest(config)))) == config


def test_help_explains_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("--preset", "doom84", "--train.steps", "Optimizer steps.", "--data.frames-per-episode", "Frames kept"):
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", "nothing"], ["expected a preset out of", "found 'nothing'"]),
        (["--nothing", "1"], ["expected a field of the config, found --nothing"]),
        (
            ["--preset", "smoke", "--resources.num-workers", "3"],
            ["expected a number of workers that divides", "found 3"],
        ),
        (["--preset", "dmlab84"], ["expected the place of recorded frames", "name it with --source PATH"]),
        (
            ["--preset", "dmlab84", "--source", "/nowhere"],
            ["expected recorded frames", "/nowhere, found no such folder"],
        ),
        (["--preset", "smoke", "--root", "/proc/nothing"], ["expected a folder that can be written at /proc"]),
        (
            ["--preset", "smoke", "--resources.num-workers", "4", "--resources.cpus-per-worker", "9999"],
            ["expected 39996 CPUs (4 workers with 9999 CPUs each", "lower --resources.num-workers"],
        ),
    ],
)
def test_messages_of_the_command(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    root = [] if "--root" in arguments else ["--root", str(tmp_path / "root")]
    assert_one_line(full(*arguments, *root, "--no-track"), *parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise InputError('one\\n  line')", 2, "error: one line\n"),
        ("raise OSError(5, 'disk')", 2, "error: OSError: [Errno 5] disk\n"),
        ("raise KeyboardInterrupt", 130, "stopped; the same command goes on from here\n"),
        ("raise SystemExit(15)", 143, "stopped; the same command goes on from here\n"),  # as Ray makes it of SIGTERM
        ("raise SystemExit(1)", 1, ""),
        ("raise SystemExit('words')", 1, "words\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("sys.stderr = None", 0, ""),
    ],
)
def test_exit_codes(action: str, code: int, said: str) -> None:
    lines = ["import sys", "from pipelines import cli", "from vqvae_core.errors import InputError"]
    lines += ["def main(arguments):", "    print('begun', end='')", f"    {action}", "cli.run(main)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "begun")
    assert said in done.stderr if said else not done.stderr
