"""`cmae demo`: pretraining on real photographs in minutes, on any machine."""
