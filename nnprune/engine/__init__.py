"""The pass over the decoder layers: the only code that moves tensors between devices, memory, disk and processes."""
