"""The pass over the decoder layers. Only this package moves tensors between devices, memory, disk and processes."""
