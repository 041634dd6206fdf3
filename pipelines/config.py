"""What a run is made of: recipes (what is computed; hashed) and resources (on what; never hashed)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.sources import SOURCES, AnySource, ViZDoomSource
from vqvae_core.augment import AugmentConfig
from vqvae_core.checkpoint import config_from_json
from vqvae_core.contender import NAMES
from vqvae_core.decoding import ImageFormat
from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import PixelCNNConfig
from vqvae_core.sampler import Draw
from vqvae_core.second_stage import SecondStageConfig
from vqvae_core.train_config import TrainConfig
from vqvae_core.vqvae import STRIDE, VQVAEConfig


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How images become shards."""

    image_size: int = 128
    """Height and width of every image, in pixels."""
    resize: Literal["crop", "exact"] = "crop"
    """crop: scale the shorter side and cut the centre out; exact: images of another size are rejected."""
    image_format: ImageFormat = "png"
    """png and webp keep every bit; jpg (quality 95, 4:4:4) saves space."""
    images_per_shard: int = 1024
    """Images in a shard; the last one of a split may have fewer."""
    mix_images: int = 1 << 21
    """Images that are permuted together. A larger source is cut into groups of whole runs, drawn by the seed."""
    max_rejected_fraction: float = field(default=0.01, metadata={"hashed": False})
    """Above this share of rejected images the stage fails and shows them."""
    holdout_images: int = 0
    """Hold back so many train images of the source, drawn by the seed, as the validation split; the source's own
    held-out images are then the test split. 0: these are the validation split, and there is no test split."""
    max_train_images: int | None = None
    """Take only so many images of the train split (of what the holdout leaves), drawn by the seed; None: all."""
    max_validation_images: int | None = None
    """The same for the validation split."""
    max_test_images: int | None = None
    """The same for the test split, where there is one."""
    seed: int = 0
    """Of the permutation that mixes classes and episodes across shards."""

    def __post_init__(self) -> None:
        if self.image_size < STRIDE or self.image_size % STRIDE:
            raise ValueError(f"image_size must be a multiple of {STRIDE}, was {self.image_size}")
        if self.images_per_shard < 1:
            raise ValueError(f"images_per_shard must be at least 1, was {self.images_per_shard}")
        if self.mix_images < self.images_per_shard:
            raise ValueError(
                f"mix_images must be at least images_per_shard {self.images_per_shard}, was {self.mix_images}"
            )
        if not 0 <= self.max_rejected_fraction <= 1:
            raise ValueError(f"max_rejected_fraction must be 0 to 1, was {self.max_rejected_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, was {self.seed}")
        if self.holdout_images < 0:
            raise ValueError(f"holdout_images must be 0 or more, was {self.holdout_images}")
        for name in ("max_train_images", "max_validation_images", "max_test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, was {value}")
        if self.max_test_images is not None and not self.holdout_images:
            raise ValueError(
                f"max_test_images must be none where holdout_images is 0, which makes no test split, was "
                f"{self.max_test_images}; set holdout_images, or limit the validation split with max_validation_images"
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What is drawn from the prior, and how."""

    num_images: int = 16
    """Samples."""
    label: str | None = None
    """Of all samples: a name of the label map, or its number; None: a sample's seed goes round the label map."""
    seed: int = 0
    """Of the first sample; sample i has seed + i."""
    draw: Draw = field(default_factory=Draw)
    """How codes are drawn."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and caches while codes are drawn."""
    output: Literal["png", "npz"] = "png"
    """A PNG for each sample, or for each part one .npz with pixels (N, H, W, 3) and labels."""
    batch_size: int = 16
    """Samples that are drawn together and make one part: a file with their tokens. It changes no sample in fp32 on a
    CPU; on a GPU or in bf16 sums may be taken in another order."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if not 0 <= self.seed <= self.seed + self.num_images <= 2**63:
            raise ValueError(f"seed must be 0 or more, and seed + num_images at most 2**63, was {self.seed}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The likelihood table: which models, how often, and the numbers of samples of their bounds."""

    models: tuple[str, ...] = NAMES
    """Out of vae, vqvae, vimco (categorical) and vimco_gaussian."""
    seeds: int = 1
    """Trainings of each model, with the seeds of the schedules and the ones after them."""
    train_samples: int = 50
    """S of VIMCO's training."""
    report_samples: tuple[int, ...] = (50,)
    """Numbers of samples of which VIMCO's bound is reported; the first is that of its total."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in NAMES]
        if unknown or not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must be different ones out of {', '.join(NAMES)}, were {' '.join(self.models)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, was {self.seeds}")
        if self.train_samples < 2:
            raise ValueError(
                f"train_samples must be at least 2 (VIMCO learns from differences), was {self.train_samples}"
            )
        found = self.report_samples
        if not found or min(found) < 1 or len(set(found)) < len(found):
            raise ValueError(f"report_samples must be different numbers of at least 1, were {found}")


@dataclass(frozen=True, kw_only=True)
class SecondStageRuns:
    """How often the second stage is trained, and what is shown of it."""

    seeds: int = 3
    """Trainings of each kind of latents: run i has the seed of its schedule + i."""
    num_frames: int = 6
    """Validation frames that are shown."""
    num_draws: int = 5
    """Grids drawn for the codes of each."""
    num_changes: int = 8
    """Values of one code in the walk that changes one of them."""
    seed: int = 0
    """Of the first grid drawn."""
    draw: Draw = field(default_factory=Draw)
    """How grids are drawn."""

    def __post_init__(self) -> None:
        for name in ("seeds", "num_frames", "num_draws", "num_changes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be 0 or more and below 2**62, was {self.seed}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on held-out images beside what needs no file. Files are named, local or s3://, and never
    downloaded from elsewhere; a recipe holds the hashes of their contents."""

    lpips: str | None = field(default=None, metadata={"hashed": False})
    """An ONNX file for LPIPS: two batches of pictures to a distance of each pair."""
    extractor: str | None = field(default=None, metadata={"hashed": False})
    """An ONNX file for FID: a batch of pictures to features (N, F)."""
    reference: str | None = field(default=None, metadata={"hashed": False})
    """A .npz with the mu (F,) and sigma (F, F) that samples are compared with; None: those of the held-out images."""

    def __post_init__(self) -> None:
        if self.reference is not None and self.extractor is None:
            raise ValueError("reference belongs to an extractor: name the one that made it with --evaluate.extractor")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """On what a run is computed. Nothing here changes a result's fingerprint."""

    num_workers: int = 1
    """Training workers (ranks)."""
    min_workers: int | None = None
    """Train with as few as these where there is no room for num_workers, and with more again where there is; None:
    always num_workers. Only as many work as divide the lanes."""
    cpus_per_worker: int | None = None
    """CPUs and threads of each; None: all CPUs, divided evenly."""
    use_gpu: bool = False
    """Give each training worker and each encoder one GPU."""
    loader_workers: int = 0
    """Processes of each training worker that decode images; 0: a thread of it."""
    micro_batch: int | None = None
    """Samples that a device takes at once; a larger share of the batch is taken in parts. None: all at once."""
    decode_mebibytes: int = 2048
    """Memory for the activations of a VAE's and VIMCO's decodings on a device. Where they do not fit at once, all are
    computed twice, in parts that do."""
    side_by_side: int = 1
    """Trainings of compare.py at one time, each with its share of the CPUs or GPUs."""
    compile: bool = True
    """Compile the model on GPUs."""
    usage_alarm: float = 0.1
    """Say so where less than this share of the codes was used in an epoch."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept of a run, beside the best by validation."""
    max_failures: int = 3
    """Times that training starts again from its last checkpoint after a worker died."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "checkpoint_every", "keep_checkpoints", "decode_mebibytes", "side_by_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ValueError(f"cpus_per_worker must be at least 1, was {self.cpus_per_worker}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(f"min_workers must be 1 to num_workers {self.num_workers}, was {self.min_workers}")
        if not 0 <= self.loader_workers <= 8:
            raise ValueError(f"loader_workers must be 0 to 8, was {self.loader_workers}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, was {self.micro_batch}")
        if not 0 <= self.usage_alarm <= 1:
            raise ValueError(f"usage_alarm must be a share from 0 to 1, was {self.usage_alarm}")
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be 0 or more, was {self.max_failures}")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Raw images to tokens, a prior, samples and figures."""

    data: AnySource = field(default_factory=ViZDoomSource)
    """Where images come from."""
    shard: ShardConfig = field(default_factory=ShardConfig)
    """Images to shards."""
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    """The VQ-VAE."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the VQ-VAE."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What its training images go through."""
    prior: PixelCNNConfig = field(default_factory=PixelCNNConfig)
    """The prior."""
    train_prior: TrainConfig = field(default_factory=TrainConfig)
    """Training of the prior."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Samples of the prior."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """The likelihood table of compare.py: its models take the VQ-VAE's encoder, decoder and schedule."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Figures on held-out images."""
    second_stage: SecondStageConfig = field(default_factory=SecondStageConfig)
    """The second stage, over the tokens; of pipelines/train_second_stage.py."""
    train_second_stage: TrainConfig = field(default_factory=TrainConfig)
    """Training of the second stage."""
    second_stage_runs: SecondStageRuns = field(default_factory=SecondStageRuns)
    """How often it is trained, and what is shown of it."""
    resources: Resources = field(default_factory=Resources)
    """Workers, CPUs, GPUs: never part of a fingerprint."""


def check_equal_steps(config: PipelineConfig, *names: str) -> None:
    """Raises `InputError` where trainings that are compared, by these schedules of the config, may end at other
    steps."""
    for name in names:
        patience = getattr(config, name).patience
        if patience is not None:
            option = f"--{name.replace('_', '-')}.patience"
            raise InputError(
                f"expected no patience, since models are compared after as many steps each, found {patience}; "
                f"give {option} None"
            )


def recipe_of(config: Any) -> Any:
    """A config as JSON values, without the fields that are never hashed."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            item.name: recipe_of(getattr(config, item.name))
            for item in dataclasses.fields(config)
            if item.metadata.get("hashed", True)
        }
    if isinstance(config, tuple | list):
        return [recipe_of(value) for value in config]
    return config


def config_from_manifest(values: dict[str, Any]) -> PipelineConfig:
    """The config that a manifest records. Raises KeyError or TypeError where fields are missing or unknown."""
    data = {name: tuple(value) if isinstance(value, list) else value for name, value in values["data"].items()}
    rest = {name: value for name, value in values.items() if name not in ("data", "source")}
    return dataclasses.replace(config_from_json(PipelineConfig, rest), data=SOURCES[values["source"]](**data))


def config_to_manifest(config: PipelineConfig) -> dict[str, Any]:
    """The resolved config as JSON values, with the kind of its source."""
    kind = next(name for name, source in SOURCES.items() if isinstance(config.data, source))
    return {**dataclasses.asdict(config), "source": kind}
