"""What the members of a tar are: names, labels, and the account of them all."""
