"""Presets: whole configs as Python values, by name."""

from dataclasses import replace

from pipelines.config import CompareConfig, PipelineConfig, Resources, SampleConfig, SecondStageRuns, ShardConfig
from pipelines.sources import HuggingFaceSource, ImageNetSource, RecordedFramesSource, ViZDoomSource
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.pixelcnn import PixelCNNConfig
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.sampler import Draw
from vqvae_core.second_stage import SecondStageConfig
from vqvae_core.train_config import TrainConfig
from vqvae_core.vqvae import VQVAEConfig

_PAPER_TRAIN = TrainConfig(steps=250_000, batch_size=128, num_lanes=64, learning_rate=2e-4)
_PAPER_RESOURCES = Resources(checkpoint_every=2000)
# 3 latents an image, so 27 bits.
_THREE_TABLES = SecondStageConfig().quantizer

DOOM84 = PipelineConfig(
    data=ViZDoomSource(train_episodes_per_map=14),
    shard=ShardConfig(image_size=84, image_format="webp"),
    vqvae=VQVAEConfig(
        hidden_channels=128,
        stem_channels=64,
        residual_channels=32,
        # 10 on the paper's scale (a sum over pixels beside a mean over latents) is what a short run needs: the ratio of
        # commitment to reconstruction is then that of 16.8 * MSE + 0.25 * commitment, both means over all elements.
        commitment_cost=10.0,
        quantizer=QuantizerConfig(num_codes=512, code_dim=16, learn_by="moving_average", decay=0.95, revive_every=50),
    ),
    train=TrainConfig(
        steps=1800,
        batch_size=16,
        num_lanes=4,
        learning_rate=2e-3,
        beta2=0.99,
        warmup_steps=100,
        schedule="cosine",
        validate_every=500,
    ),
    prior=PixelCNNConfig(channels=96, num_layers=8, first_kernel_size=5, head_channels=128),
    train_prior=TrainConfig(
        steps=1500,
        batch_size=8,
        num_lanes=4,
        learning_rate=3e-3,
        beta2=0.99,
        warmup_steps=50,
        schedule="cosine",
        validate_every=500,
    ),
    sample=SampleConfig(num_images=21, batch_size=11, draw=Draw(temperature=0.85)),
)

DMLAB84 = PipelineConfig(
    data=RecordedFramesSource(),
    shard=ShardConfig(image_size=84, resize="exact"),
    vqvae=VQVAEConfig(quantizer=QuantizerConfig(num_codes=512, code_dim=64, revive_every=200)),
    train=_PAPER_TRAIN,
    prior=PixelCNNConfig(),
    train_prior=_PAPER_TRAIN,
    sample=SampleConfig(num_images=64),
    second_stage=SecondStageConfig(
        channels=128,
        residual_channels=128,
        quantizer=_THREE_TABLES,
        commitment_cost=1.0,
        decoder=PixelCNNConfig(dropout=0.1),
    ),
    train_second_stage=TrainConfig(
        steps=50_000,
        batch_size=128,
        num_lanes=64,
        learning_rate=1e-3,
        beta2=0.99,
        warmup_steps=500,
        schedule="cosine",
        validate_every=500,
        validation_images=1024,
    ),
    resources=_PAPER_RESOURCES,
)

DMLAB84_SMALL = PipelineConfig(
    data=RecordedFramesSource(),
    shard=ShardConfig(image_size=84, resize="exact", image_format="webp"),
    vqvae=DOOM84.vqvae,
    train=replace(DOOM84.train, steps=3000),
    prior=DOOM84.prior,
    train_prior=DOOM84.train_prior,
    sample=SampleConfig(num_images=32, draw=Draw(temperature=0.85)),
    second_stage=SecondStageConfig(
        quantizer=_THREE_TABLES,
        commitment_cost=1.0,
        decoder=PixelCNNConfig(channels=64, num_layers=6, first_kernel_size=5, head_channels=128),
    ),
    train_second_stage=TrainConfig(
        steps=1500,
        batch_size=32,
        num_lanes=4,
        learning_rate=2e-3,
        beta2=0.99,
        warmup_steps=100,
        schedule="cosine",
        validate_every=250,
        validation_images=512,
    ),
)

IMAGENET128 = PipelineConfig(
    data=ImageNetSource(),
    shard=ShardConfig(image_size=128, image_format="jpg"),
    vqvae=VQVAEConfig(quantizer=QuantizerConfig(num_codes=512, code_dim=64, revive_every=200)),
    train=_PAPER_TRAIN,
    prior=PixelCNNConfig(channels=256, num_layers=20),
    train_prior=_PAPER_TRAIN,
    sample=SampleConfig(num_images=64),
    resources=_PAPER_RESOURCES,
)

CIFAR10 = PipelineConfig(
    data=HuggingFaceSource(),
    shard=ShardConfig(image_size=32, resize="exact", holdout_images=5000),
    vqvae=VQVAEConfig(
        commitment_cost=150.0,  # beside a sum over 3,072 sub-pixels
        likelihood=LikelihoodConfig(kind="categorical"),
        quantizer=QuantizerConfig(num_codes=512, code_dim=2, num_groups=10, learn_by="moving_average", revive_every=50),
    ),
    train=_PAPER_TRAIN,
    prior=PixelCNNConfig(channels=256, num_layers=15, use_labels=False, dropout=0.1),
    train_prior=replace(_PAPER_TRAIN, steps=100_000),
    sample=SampleConfig(num_images=64),
    compare=CompareConfig(seeds=1, train_samples=50, report_samples=(50,)),
    resources=_PAPER_RESOURCES,
)

CIFAR10_SMALL = PipelineConfig(
    data=HuggingFaceSource(),
    shard=ShardConfig(image_size=32, resize="exact", holdout_images=5000),
    vqvae=VQVAEConfig(
        hidden_channels=64,
        residual_channels=32,
        commitment_cost=150.0,  # as in cifar10
        likelihood=LikelihoodConfig(kind="logistic"),
        quantizer=QuantizerConfig(
            num_codes=512, code_dim=2, num_groups=10, learn_by="moving_average", decay=0.95, revive_every=50
        ),
    ),
    train=TrainConfig(
        steps=3000,
        batch_size=32,
        num_lanes=4,
        learning_rate=2e-3,
        beta2=0.99,
        warmup_steps=100,
        schedule="cosine",
        validate_every=1000,
        validation_images=1000,
        log_every=50,
    ),
    prior=PixelCNNConfig(channels=64, num_layers=6, first_kernel_size=5, head_channels=64, use_labels=False),
    train_prior=TrainConfig(
        steps=1000,
        batch_size=32,
        num_lanes=4,
        learning_rate=2e-3,
        beta2=0.99,
        warmup_steps=50,
        schedule="cosine",
        validate_every=500,
    ),
    sample=SampleConfig(num_images=64, batch_size=16),
    compare=CompareConfig(models=("vae", "vqvae", "vimco"), seeds=3, train_samples=10, report_samples=(10, 50)),
    resources=Resources(checkpoint_every=500),
)

SMOKE = PipelineConfig(
    data=ViZDoomSource(maps=("E1M3", "MAP04"), train_episodes_per_map=2, frames_per_episode=24, actions_per_frame=1),
    shard=ShardConfig(image_size=32, images_per_shard=32),
    vqvae=VQVAEConfig(
        hidden_channels=16,
        residual_channels=8,
        num_residual_blocks=1,
        quantizer=QuantizerConfig(num_codes=32, code_dim=8, learn_by="moving_average", revive_every=4),
    ),
    train=TrainConfig(steps=24, batch_size=8, num_lanes=4, learning_rate=1e-3, log_every=4, validate_every=12),
    prior=PixelCNNConfig(channels=16, num_layers=2, first_kernel_size=3, head_channels=16),
    train_prior=TrainConfig(steps=24, batch_size=8, num_lanes=4, learning_rate=1e-3, log_every=4, validate_every=12),
    sample=SampleConfig(num_images=4, batch_size=3),
    compare=CompareConfig(train_samples=3, report_samples=(3, 6)),
    second_stage=SecondStageConfig(
        channels=16,
        residual_channels=16,
        num_residual_blocks=1,
        quantizer=replace(_THREE_TABLES, num_codes=16, code_dim=4, revive_every=4, revive_until=1.0),
        decoder=PixelCNNConfig(channels=16, num_layers=2, first_kernel_size=3, head_channels=16),
    ),
    train_second_stage=TrainConfig(
        steps=24, batch_size=8, num_lanes=4, learning_rate=1e-3, log_every=4, validate_every=12
    ),
    second_stage_runs=SecondStageRuns(num_frames=3, num_draws=2, num_changes=3),
    resources=Resources(checkpoint_every=8),
)

PRESETS: dict[str, tuple[PipelineConfig, str]] = {
    "doom84": (DOOM84, "84x84 frames of ViZDoom, live: the embedded default, minutes on 2 cores"),
    "dmlab84": (DMLAB84, "84x84 frames of DeepMind Lab, recorded as Parquet: the paper's schedule"),
    "dmlab84-small": (DMLAB84_SMALL, "the same frames on 2 cores, with a second stage: train_second_stage.py"),
    "imagenet128": (IMAGENET128, "128x128 ImageNet from the official archives: the paper's schedule"),
    "cifar10": (CIFAR10, "32x32 CIFAR-10 as Parquet, for compare.py: the paper's likelihood table, its schedule"),
    "cifar10-small": (CIFAR10_SMALL, "the same in small, with logistic likelihoods, on 2 cores"),
    "smoke": (SMOKE, "32x32 frames of ViZDoom, seconds: for tests"),
}
