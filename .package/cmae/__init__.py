"""Pretraining of Contrastive Masked Autoencoders from sharded images; see the four rooms inside."""

from importlib import metadata

from cmae import nvjpeg as nvjpeg  # loads a library, before anything loads an older one of that name

__version__ = metadata.version("cmae")
