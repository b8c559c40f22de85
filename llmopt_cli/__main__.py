"""`python -m llmopt_cli` is `llmopt`."""

from llmopt_cli.cli import main

main()
