"""The whole pipeline: source to image shards, VQ-VAE, tokens, prior, samples, figures and a report.

    python pipelines/full.py --preset doom84 --root runs/doom84

The same command again goes on where it stopped, and does nothing where all is done. --help explains every field.
"""

import os
from collections.abc import Callable

from pipelines import cli
from pipelines.config import PipelineConfig
from pipelines.evaluate import NO_JUDGES, Judges, card_text, evaluate
from pipelines.program import conduct
from pipelines.report import make_report
from pipelines.sample import sample
from pipelines.shard import shard
from pipelines.stage import Pipeline
from pipelines.tokenize_images import tokenize_images
from pipelines.train_prior import train_prior
from pipelines.train_vqvae import train_vqvae

LAST = "evaluate"


def main(arguments: list[str], until: str = LAST) -> None:
    """Run the stages in order, up to and with `until`; each stage's own file runs up to itself."""
    options = cli.parse(arguments)
    judges = Judges.read(options.config.evaluate) if until == LAST else NO_JUDGES

    def stages(pipeline: Pipeline, config: PipelineConfig) -> Callable[[float], bytes] | None:
        _stages(pipeline, config, until, judges)
        if until != LAST:
            return None
        return lambda seconds: make_report(options.title, pipeline.reports, pipeline.config, seconds)

    pipeline, summary = conduct(options, stages)
    if until == LAST:
        _figures(pipeline)
    print(summary)


def _stages(pipeline: Pipeline, config: PipelineConfig, until: str, judges: Judges) -> None:
    images = shard(pipeline, config.data, config.shard)
    if until == "shard":
        return
    vqvae = train_vqvae(pipeline, config, images)
    if until == "train_vqvae":
        return
    tokens = tokenize_images(pipeline, images, vqvae)
    if until == "tokenize":
        return
    prior = train_prior(pipeline, config, tokens)
    if until == "train_prior":
        return
    samples = sample(pipeline, config.sample, prior, vqvae)
    if until == "sample":
        return
    evaluate(pipeline, images, vqvae, tokens, prior, samples, judges)


def _figures(pipeline: Pipeline) -> None:
    facts = {report.name: report.artifact.facts for report in pipeline.reports}
    model, prior = facts["train_vqvae"], facts["train_prior"]
    gain = prior["gain_bits_per_token"]
    side = "below" if gain >= 0 else "above"
    print(
        f"PSNR {model['psnr_db']:.2f} dB on validation images, {model['psnr_db'] - model['shrunken_psnr_db']:+.2f} dB "
        f"over {model['shrunken_side']}x{model['shrunken_side']} bicubic, "
        f"{model['psnr_db'] - model['same_bits_psnr_db']:+.2f} dB over "
        f"{model['same_bits_side']}x{model['same_bits_side']} (equal bits)"
    )
    print(f"codes: perplexity {model['perplexity']:.0f} of {model['K']}, {100 * model['usage']:.1f} % in use")
    print(f"prior: {prior['bits_per_token']:.3f} bits/token, {abs(gain):.2f} {side} the tokens' unigram entropy")
    measured = facts["evaluate"]
    shown = {"ssim": "SSIM {:.4f}", "ms_ssim": "MS-SSIM {:.4f}", "lpips": "LPIPS {:.4f}", "rfid": "rFID {:.3f}",
             "fid": "FID of samples {:.3f}", "total_bits_per_dim_uniform": "{:.4f} bits/dim (uniform prior)",
             "total_bits_per_dim": "{:.4f} (learned prior)"}  # fmt: skip
    parts = [form.format(measured[name]) for name, form in shown.items() if measured[name] is not None]
    print(f"{measured['split']}, {measured['num_images']:,} images: {', '.join(parts) or 'too small for SSIM'}")
    for title, card in (("FID", measured["card"]), ("LPIPS", measured["lpips_card"])):
        if card is not None:
            print(f"{title} card: {card_text(card)}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    cli.run(main)
