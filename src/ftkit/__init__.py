"""Fine-tune large language models with six small commands that chain."""

__version__ = "0.1.0"
