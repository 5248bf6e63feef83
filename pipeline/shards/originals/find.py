"""The images that a user names, whatever they lie in."""

from __future__ import annotations

from pathlib import Path

from cmae.errors import CmaeError
from cmae.pipeline.shards.originals.image_archive import is_archive, scan_image_archive
from cmae.pipeline.shards.originals.image_folder import read_image_list, scan_image_folder
from cmae.pipeline.shards.originals.imagenet_devkit import label_validation
from cmae.pipeline.shards.originals.source import ImageSource, Layout


def find_images(
    images: str | Path,
    *,
    list_file: str | Path | None = None,
    devkit: str | Path | None = None,
    layout: Layout = "auto",
) -> ImageSource:
    """Find images with `scan_image_folder`, `scan_image_archive` or `read_image_list`, whichever fits.

    Args:
        images: A folder or a tar; the folder of relative paths where there is a list.
        list_file: Lines of path and label, instead of all images.
        devkit: ImageNet's development kit, which labels its validation images.
        layout: Reading of folders, one of `Layout`.

    Raises:
        CmaeError: Both a list and a kit, or what these functions refuse.
    """
    if list_file is not None and devkit is not None:
        raise CmaeError("--list_file and --devkit both say the labels: give one of them")
    if list_file is not None:
        return read_image_list(list_file, root=images)
    scan = scan_image_archive if is_archive(images) else scan_image_folder
    source = scan(images, layout=layout)
    return source if devkit is None else label_validation(source, devkit)
