"""`cmae plan`: a run on GPUs that nobody has rented yet."""
