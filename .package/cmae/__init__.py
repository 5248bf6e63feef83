"""Pretraining of Contrastive Masked Autoencoders from sharded images; see the four rooms inside."""

from importlib import metadata

__version__ = metadata.version("cmae")
