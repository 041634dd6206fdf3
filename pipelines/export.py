"""A VQ-VAE for programs without torch: its encoder and decoder as ONNX files.

    python pipelines/export.py runs/doom84/train_vqvae-2cf63a77867a --out onnx

encoder.onnx: pixels, uint8 (N, H, W, 3), to tokens, int64 (N, H/4, W/4); decoder.onnx: the other way.
"""

import argparse

from pipelines import cli
from pipelines.preflight import check_place
from vqvae_core.onnx_export import export
from vqvae_core.storage import Folder
from vqvae_core.vqvae import VQVAE


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="export.py", description="Export a VQ-VAE to ONNX.")
    parser.add_argument("model", help="folder of the VQ-VAE's artifact")
    parser.add_argument("--out", default="onnx", help="folder to write to, local or s3:// (onnx)")
    options = parser.parse_args(arguments)
    out = Folder.of(options.out)
    check_place(out)
    for name, data in export(VQVAE.load(Folder.of(options.model).uri)).items():
        out.write(name, data)
        print(f"{name}: {len(data) / 2**20:.1f} MiB: {out.path(name)}")


if __name__ == "__main__":
    cli.run(main)
