"""Chat templates: one Jinja file each; its stem is the value of `template:`."""
