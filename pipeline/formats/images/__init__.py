"""Encoded images: what their headers say, damage in them, and their pixels."""
