"""Encoder and decoder as a pipeline service: make a translation model, split it, serve it, load it, compare.

python src/ectrans.py prepare --out models/nmt --synthetic 2000        tokenizer and random weights
python src/ectrans.py train --model models/nmt --steps 1000            on the made language
python src/ectrans.py split --model models/nmt --out parts             encoder, decoder, client's part
python src/ectrans.py predict --parts parts "ba ruto"                  one process, in batches
python src/ectrans.py serve --parts parts --port 5550                 the pipeline; load, compare and simulate: --help
"""

from __future__ import annotations

import typer

from corun.ectrans import commands_model, commands_pipeline

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
commands_model.register(app)
commands_pipeline.register(app)

if __name__ == "__main__":
    app()
