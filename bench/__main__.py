"""`python -m bench NAME`: measures, prints a table, and writes JSON where `--out` says."""

from __future__ import annotations

import argparse

from bench import attention, decode, interop, l1, layers, linear, tune, varlen

BENCHMARKS = {
    "attention": attention,
    "decode": decode,
    "interop": interop,
    "l1": l1,
    "layers": layers,
    "linear": linear,
    "tune": tune,
    "varlen": varlen,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").partition(": ")[2]))
    args = parser.parse_args()
    BENCHMARKS[args.name].main(args)


if __name__ == "__main__":
    main()
