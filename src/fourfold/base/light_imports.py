"""Modules of Transformers that import a package merely because it is installed, imported without it.

`generate` with an assistant model asks scikit-learn for a curve, losses of object detection ask SciPy for a matching,
and what reads images and videos asks torchvision. Where these packages are installed, each import of the library
brings them along, with pandas and models of torchvision's own: some 2 s of a start on an H100's host. Fourfold
needs none of them; in its process Transformers' image processors do without torchvision. To be imported before the rest
of Transformers.
"""

from __future__ import annotations

from unittest import mock

from fourfold.base.distributions import distributions_kept

with distributions_kept():
    import transformers.utils

with (
    distributions_kept(),
    mock.patch.object(transformers.utils, "is_sklearn_available", return_value=False, create=True),
    mock.patch.object(transformers.utils, "is_scipy_available", return_value=False, create=True),
    mock.patch.object(transformers.utils, "is_torchvision_available", return_value=False, create=True),
):
    import transformers.generation.candidate_generator
    import transformers.image_utils
    import transformers.loss.loss_utils
    import transformers.video_utils
