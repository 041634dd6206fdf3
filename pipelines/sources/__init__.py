"""The sources of images. A new one is one file with the methods of `base.Source`, and its name here."""

from pipelines.sources.imagenet import ImageNetSource
from pipelines.sources.recorded import RecordedFramesSource
from pipelines.sources.vizdoom import ViZDoomSource

AnySource = ViZDoomSource | RecordedFramesSource | ImageNetSource
SOURCES: dict[str, type] = {
    "vizdoom": ViZDoomSource,
    "recorded_frames": RecordedFramesSource,
    "imagenet": ImageNetSource,
}
