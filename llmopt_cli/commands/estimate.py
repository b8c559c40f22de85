"""`llmopt estimate`: does a model fit on a GPU, how fast, for how much. Parses and renders; the core plans."""

from __future__ import annotations

from typing import Annotated

import typer

from llmopt_cli.options import JsonOpt, MaxModelLenOpt, RecipeOpt
from llmopt_cli.output import Output

ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model", help="A name (`70b`, `qwen3-32b`: see `llmopt models`), a folder, a config.json or `demo`."
    ),
]
GpuOpt = Annotated[
    str | None, typer.Option("--gpu", help="NAME or NAMExN: `a100`, `h100x4`. All of them: `llmopt gpus`.")
]
SchemeOpt = Annotated[
    str | None, typer.Option("--scheme", help="Precision of the weights: bf16 (default), int8, fp8, awq, gptq, ...")
]
ConcurrencyOpt = Annotated[int, typer.Option("--concurrency", min=1, help="Requests at the same time.")]
InputLenOpt = Annotated[int, typer.Option("--input-len", min=1, help="Prompt tokens of a request.")]
OutputLenOpt = Annotated[int, typer.Option("--output-len", min=1, help="Generated tokens of a request.")]
SeqsOpt = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, help="Most requests in one batch; 256 as vLLM has it.")
]
TpOpt = Annotated[
    int | None,
    typer.Option("--tp", "--tensor-parallel-size", min=1, help="GPUs to share the model; by default all are weighed."),
]
PriceOpt = Annotated[
    float | None, typer.Option("--gpu-price", min=0, help="USD an hour for one GPU, instead of the catalogue's.")
]


def estimate(
    model: ModelOpt = None,
    gpu: GpuOpt = None,
    scheme: SchemeOpt = None,
    concurrency: ConcurrencyOpt = 32,
    input_len: InputLenOpt = 1024,
    output_len: OutputLenOpt = 256,
    max_model_len: MaxModelLenOpt = None,
    max_num_seqs: SeqsOpt = None,
    tp: TpOpt = None,
    gpu_price: PriceOpt = None,
    recipe: RecipeOpt = None,
    json: JsonOpt = False,
) -> None:
    """Does a model fit on a GPU, how fast is it there, and what does a token cost? Nothing is downloaded or run."""
    from llmopt_cli.estimate import deployment, plan
    from llmopt_cli.estimate.load import Load
    from llmopt_cli.views import plan as view

    wanted = deployment.wanted(
        recipe,
        model=model,
        gpu=gpu,
        scheme=scheme,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        tensor_parallel_size=tp,
    )
    found = plan.answer(plan.ask(wanted, Load.fixed(concurrency, input_len, output_len), gpu_price))
    Output(as_json=json).result(view.data(found, wanted), lambda: view.render(found, wanted))
