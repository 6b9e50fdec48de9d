"""lamina: federated finetuning of small pretrained Transformers under device budgets."""

__version__ = "0.1.0"
