"""Tokenise files into a Megatron shard: `python -m data_prep.tokenize_corpus --input FILES --tokenizer FOLDER --output PREFIX`.

Writes PREFIX.bin, PREFIX.idx and PREFIX.manifest.json. Stopped or killed, it goes on when it is run again.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from nanotrain.config.errors import UserError
from nanotrain.data.encoders import ENCODERS
from nanotrain.data.tokenize_files import TokenizeJob, estimate, find_inputs, tokenize_files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tokenize_corpus", description="Tokenise files into a shard."
    )
    parser.add_argument("--input", required=True, help="a file or a quoted glob: jsonl (.gz, .zst), parquet, txt")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: text)")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder with tokenizer.json")
    parser.add_argument("--output", required=True, type=Path, help="prefix of the shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--eos-token", help="token that ends a document (default: the tokenizer's eos_token)")
    parser.add_argument(
        "--encoder", default="auto", choices=("auto", *ENCODERS), help="default: the fastest that is exact"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and how large the result is")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 the input or the output is not right."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        if options.workers < 1:
            raise UserError(f"--workers ({options.workers}) must be at least 1.")
        job = TokenizeJob(
            files=find_inputs(options.input),
            text_key=options.text_key,
            tokenizer_folder=options.tokenizer,
            output=options.output,
            eos_token=options.eos_token,
            encoder=options.encoder,
            workers=options.workers,
        )
        if options.dry_run:
            found = estimate(job)
            print(
                f"{found.files} files, {found.input_bytes / 1e6:.1f} MB, encoder {found.encoder}, {found.state}\n"
                f"about {found.documents} documents and {found.tokens / 1e6:.2f} million tokens\n"
                f"about {found.output_bytes / 1e6:.1f} MB into {job.output}.bin and {job.output}.idx"
            )
            return 0
        manifest = tokenize_files(job)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{manifest['tokens']} tokens of {manifest['documents']} documents in {job.output}.bin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
