"""llmopt: size, quantize, benchmark and serve language models. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
