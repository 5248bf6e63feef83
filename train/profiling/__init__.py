"""Where the time of a training step goes: phases, a closed account, a verdict, predictions and reports."""
