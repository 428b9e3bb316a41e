"""Fine-tuning, PEFT, distillation and their hybrid, compared as pytest cases."""
