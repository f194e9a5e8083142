"""From files to token batches: sources, formats, templates, encoding, packing, batches."""
