"""What the kernels do, by PyTorch's operations, for every device, type and size."""
