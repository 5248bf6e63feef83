"""One op a file: dispatcher, torch reference with the same signature, Triton kernel and its launcher."""
