"""The mathematics of KLQ on plain tensors: no model, no I/O."""
