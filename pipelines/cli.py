"""The command line: presets, dotted overrides, and errors as one line."""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import tyro

from cluster.session import ResourceError
from pipelines.config import PipelineConfig, config_from_manifest
from pipelines.presets import PRESETS
from pipelines.ray_train import TrainingFailedError
from pipelines.sources import SOURCES
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import NonFiniteLossError, StoppedError

USER_ERRORS = (InputError, ResourceError, NonFiniteLossError, TrainingFailedError)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line gives beside the config."""

    preset: str
    root: str
    track: bool
    config: PipelineConfig
    more: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What a run is called: its preset, with the kind of source where that is another one."""
        kind = _other_kind(self.preset, self.config)
        return self.preset if kind is None else f"{self.preset}, {kind}"


def parse(
    arguments: list[str], default_preset: str = "doom84", *, program: str = "full.py", more: tuple[str, ...] = ()
) -> Options:
    """Options from arguments. more: names of a program's own options. Raises `InputError` in one line for anything that
    does not fit; exits 0 on --help."""
    own, rest = _take(arguments, ("--preset", "--root", "--source", "--source-kind", "--config", *more))
    track = "--no-track" not in rest
    rest = [argument for argument in rest if argument != "--no-track"]
    preset = own.get("--preset", default_preset)
    if preset not in PRESETS:
        raise InputError(f"expected a preset out of {', '.join(PRESETS)}, found {preset!r}{_nearest(preset, PRESETS)}")
    config = PRESETS[preset][0]
    if "--config" in own:
        config = replay(own["--config"])
    if "--source-kind" in own:
        kind = own["--source-kind"]
        if kind not in SOURCES:
            raise InputError(
                f"expected a kind of source out of {', '.join(SOURCES)}, found {kind!r}{_nearest(kind, SOURCES)}"
            )
        if not isinstance(config.data, SOURCES[kind]):
            config = dataclasses.replace(config, data=SOURCES[kind]())
    if "--source" in own:
        if not any(item.name == "path" for item in dataclasses.fields(config.data)):
            raise InputError(
                f"expected no --source for the preset {preset}, whose frames are made live, found {own['--source']!r}; "
                "choose another --preset, or what lies there with --source-kind"
            )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=Folder.of(own["--source"]).uri))
    if "--help" in rest or "-h" in rest:
        print(_usage(program))
    else:
        _check_names(rest, config)
    return Options(
        preset=preset,
        root=own.get("--root") or _default_root(preset, config, replays="--config" in own and "--preset" not in own),
        track=track,
        config=_overridden(config, rest),
        more={name: own[name] for name in more if name in own},
    )


def _default_root(preset: str, config: PipelineConfig, *, replays: bool) -> str:
    """runs/PRESET; for another kind of source, whose artifacts and report are no preset's, with its name."""
    if replays:
        raise InputError("expected --root FOLDER with --config, since a manifest does not say where to, found none")
    kind = _other_kind(preset, config)
    return f"runs/{preset}" if kind is None else f"runs/{preset}-{kind}"


def _other_kind(preset: str, config: PipelineConfig) -> str | None:
    """The kind of a config's source; None where it is the preset's own."""
    kinds = {source: kind for kind, source in SOURCES.items()}
    kind, own = kinds[type(config.data)], kinds[type(PRESETS[preset][0].data)]
    return None if kind == own else kind


def _take(arguments: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The values of some options, as `--name value` or `--name=value`, and the arguments without them."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value:
            raise InputError(f"expected a value after {name}, found none")
        taken[name] = value
    return taken, rest


def _usage(program: str) -> str:
    presets = "\n".join(f"  {name:14} {what}" for name, (_, what) in PRESETS.items())
    return (
        f"usage: {program} [--preset NAME] [--root FOLDER] [--source PLACE] [--source-kind KIND] [--config MANIFEST] "
        f"[--no-track] [--FIELD VALUE ...]\n\npresets (--preset):\n{presets}\n\n"
        "--root FOLDER      where artifacts go, local or s3://bucket/prefix (runs/PRESET, or with another kind of\n"
        "                   source runs/PRESET-KIND)\n"
        "--source PLACE     folder with the source's files, local or s3://\n"
        f"--source-kind KIND  what lies there, where the preset expects something else: {', '.join(SOURCES)}\n"
        "--config MANIFEST  a manifest.json whose config is run again\n"
        "--no-track         without MLflow\n"
    )


def _dotted(config: Any, prefix: str = "") -> dict[str, str]:
    """--option of every field of a config, and what its value must be."""
    found: dict[str, str] = {}
    for item in dataclasses.fields(config):
        name = prefix + item.name.replace("_", "-")
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found |= _dotted(value, f"{name}.")
        else:
            found[f"--{name}"] = _expected(item.type)
            if isinstance(value, bool):
                found[f"--{prefix}no-{item.name.replace('_', '-')}"] = "nothing"
    return found


def _expected(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_expected(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return "one or more values"
    return "none" if kind is type(None) else f"a value of type {getattr(kind, '__name__', kind)}"


def _check_names(arguments: list[str], config: PipelineConfig) -> None:
    known = _dotted(config)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in known:
            raise InputError(
                f"expected a field of the config, found {name}{_nearest(name, known)}; --help lists all fields"
            )


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _overridden(config: PipelineConfig, arguments: list[str]) -> PipelineConfig:
    if "--help" in arguments or "-h" in arguments:
        return _tyro(config, arguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            return _tyro(config, arguments)
    except SystemExit:
        raise InputError(_refusal(said.getvalue()) or _misfit(config, arguments)) from None


def _tyro(config: PipelineConfig, arguments: list[str]) -> PipelineConfig:
    marked = Annotated[PipelineConfig, tyro.conf.AvoidSubcommands]
    return tyro.cli(marked, default=config, args=arguments, prog="full.py")


def _refusal(page: str) -> str | None:
    """What a config's own check said, out of the framed page that tyro makes of it."""
    lines = (line.strip("│╭╰╮╯─- ") for line in page.splitlines())
    text = " ".join(line for line in lines if line)
    found = re.search(r"Error parsing [\w.-]+: (.*?)\s*(For full helptext|$)", text)
    reason = found.group(1) if found else ""
    return None if not reason or "Argument helptext" in reason else reason


def _misfit(config: PipelineConfig, arguments: list[str]) -> str:
    """The first option whose value is not of its field's type."""
    known = _dotted(config)
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            if not equals:
                value = arguments[position + 1] if position + 1 < len(arguments) else ""
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    _tyro(config, [name, value] if value else [name])
            except SystemExit:
                kind = known[name.replace("_", "-")]
                return f"expected {kind} for {name}, found {value or 'none'}; --help explains it"
    return f"expected --FIELD VALUE pairs, found {' '.join(arguments)}; --help lists all fields"


def replay(location: str) -> PipelineConfig:
    """The config in a manifest, as it was run. Raises `InputError` where there is none or its fields are unknown."""
    try:
        place, _, name = Folder.of(location).uri.rpartition("/")
        values = json.loads(Folder(place).read(name))["provenance"]["config"]
        return config_from_manifest(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"expected a manifest.json with a config at {location}, but: {type(error).__name__} {error}"
        ) from error


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command and end the process: errors that a user can fix are one line on stderr and exit code 2; Ctrl-C is
    130, SIGTERM 143."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = 0
    try:
        main(sys.argv[1:])
    except USER_ERRORS as error:
        code = _refused(str(error))
    except OSError as error:
        code = _refused(f"{type(error).__name__}: {error}")
    except StoppedError as error:
        print(f"{error}; the same command goes on from here", file=sys.stderr)
        code = 143
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # Ray makes this of the signal, once it runs
            print("stopped; the same command goes on from here", file=sys.stderr)
            code = 128 + signal.SIGTERM
        elif stop.code is None or isinstance(stop.code, int):
            code = stop.code or 0
        else:
            print(stop.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)


def _refused(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter apart: threads of Arrow that wait for it abort the process now and then
    (apache/arrow#34314), when all is done and written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream may be closed, or None
            stream.flush()
    os._exit(code)
