"""Keys of the export: a merged model in a folder."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import LocalPath, Section, key


class ExportConfig(Section):
    """Where and how a finished model is written."""

    title: ClassVar[str] = "Export"

    export_dir: LocalPath | None = key(None, "Folder to write the model to.")
    export_size: int = key(5, "Largest file, in GB.", ge=1)
    export_device: Literal["cpu", "auto"] = key("cpu", "Device that merges; auto takes the GPU if there is one.")
    export_hub_model_id: str | None = key(None, "Also upload to this repository of the Hugging Face hub.")
