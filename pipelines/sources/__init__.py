"""The sources of images. A new one is one file with the methods of `base.Source`, and its name here."""

from pipelines.sources.cifar10 import Cifar10Source
from pipelines.sources.class_folders import ClassFoldersSource
from pipelines.sources.dmlab import DMLabSource
from pipelines.sources.huggingface import HuggingFaceSource
from pipelines.sources.imagenet import ImageNetSource
from pipelines.sources.recorded import RecordedFramesSource
from pipelines.sources.vizdoom import ViZDoomSource
from pipelines.sources.webdataset_tars import WebDatasetSource

AnySource = (
    ViZDoomSource
    | RecordedFramesSource
    | ImageNetSource
    | ClassFoldersSource
    | HuggingFaceSource
    | Cifar10Source
    | WebDatasetSource
    | DMLabSource
)
SOURCES: dict[str, type] = {
    "vizdoom": ViZDoomSource,
    "recorded_frames": RecordedFramesSource,
    "imagenet": ImageNetSource,
    "class_folders": ClassFoldersSource,
    "huggingface": HuggingFaceSource,
    "cifar10": Cifar10Source,
    "webdataset": WebDatasetSource,
    "dmlab": DMLabSource,
}
