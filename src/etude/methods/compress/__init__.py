"""Making a model smaller: pruning, quantization, distillation."""
