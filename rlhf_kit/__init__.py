"""rlhf_kit: train a ChatGPT-style model the InstructGPT way, on one GPU or a cluster."""

__version__ = "0.1.0"
