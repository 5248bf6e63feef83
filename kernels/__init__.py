"""One op a file: a dispatcher, and the torch reference with the same signature."""
