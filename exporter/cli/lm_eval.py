"""`depthcut lm-eval`."""

from __future__ import annotations

import sys

import click


@click.command(
    name="lm-eval",
    short_help="Run lm-eval's command line on depthcut's models.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command line, with the additional model `--model depthcut`.

    All arguments are lm-eval's. The model takes --model_args pretrained=FOLDER, and provider,
    threads, max_length and max_gen_toks.
    """
    from exporter.optional import require

    command_line = require("lm_eval.__main__", extra="eval")
    require("exporter.compare.tasks.lm_eval_model", extra="eval").register()
    sys.argv = ["lm-eval", *arguments]
    command_line.cli_evaluate()
